"""Budget forcing: a state machine of each row, inside the decode loop.

The machine never sees the model. One step of the decode loop is

  logits -> `plan` -> choose a token -> `advance` -> the token to feed next

The record of a row is assembled afterwards: for each step, first retract the
last `emit.dropped` tokens, then append `emit.token` if `emit.provenance` is
not `NONE`. The token to feed next is `state.last` at position
`prompt_length + state.num_tokens - 1`. Cached keys at that position or later
belong to retracted tokens, and have to be invalidated first.

A row is before its thinking (`PRE`), in it (`THINK`), past it (`ANSWER`) or
`DONE`; thinking that has ended is not entered again. What its text ends in is
the state of an automaton (`node`), which takes a step with each sampled token.
`cursor` points into the tape, the strings that can be forced, one after the
other. A row forces tokens while its cursor points at one. Every rule is a
`where` over [B], and budgets and strings are data: changing a budget never
recompiles, and other strings do only if their tables have other shapes.

  B: rows    V: vocabulary    W: window of recent tokens

Reference: s1, https://arxiv.org/abs/2501.19393, section 3.1, and its public
code. What differs from it, and why: docs/budget_forcing.md.
"""

import dataclasses

import jax
import jax.numpy as jnp

from posttrain.sampler.budget_bans import at, banned, rows_of, stop_hits
from posttrain.sampler.budget_state import (
  ANSWER,
  BUDGET,
  CLOSED,
  DONE,
  EOS,
  FORCED,
  LENGTH,
  NATURAL,
  NONE,
  PRE,
  SAMPLED,
  THINK,
  Budgets,
  BudgetState,
  Emit,
  append,
  retract,
)
from posttrain.sampler.budget_tables import BudgetTables, Matcher, Tape
from posttrain.sharding import spec
from posttrain.text import delimiters


def init(
    tables: BudgetTables, budgets: Budgets, in_thinking: jax.Array,
    last_prompt_token: jax.Array, done: jax.Array,
) -> BudgetState:
  """Makes the state that rows have after their prompts.

  Args:
    tables, budgets: the strings, and the limits of each row.
    in_thinking: [B] bool, the row begins inside an open thinking section. In
      the others thinking begins when the model has sampled `start` whole;
      never, if that is empty.
    last_prompt_token: [B] int32.
    done: [B] bool, padding rows that generate nothing.
  """
  zeros = jnp.zeros_like(last_prompt_token)
  phase = node = zeros + ANSWER
  if tables.matcher:
    phase = jnp.where(in_thinking, THINK, PRE) + zeros
    node = jnp.where(in_thinking, tables.matcher.think, delimiters.PRE) + zeros
  recent = jnp.zeros((zeros.size, tables.window), jnp.int32,
                     out_sharding=spec("rows", None))
  state = BudgetState(
      phase=jnp.where(done, DONE, phase), cursor=zeros, resume=zeros,
      node=node, sizes=recent, thinking=zeros, steps=zeros, answer=zeros,
      # Only the last prompt token is known: a newline may end in it.
      recent=append(recent, last_prompt_token, zeros == 0),
      num_tokens=zeros, draws=zeros,
      waits_left=budgets.num_waits, wait_count=zeros, just_waited=zeros != 0,
      think_end=zeros, finish_reason=zeros)
  # A maximum of 0 closes the thinking before its first token.
  return _at_maximum(tables, budgets, state)


def plan(
    tables: BudgetTables, budgets: Budgets, state: BudgetState,
) -> tuple[jax.Array, jax.Array | None]:
  """Plans the next choice: tokens that are forced, and ids that are banned.

  Returns:
    forced: [B] int32, the token that must be emitted, or -1. Always -1 in a
      row that is done.
    banned: [B, V] bool, ids that may not be sampled, none in a row that
      forces. None if thinking is unused, as nothing is banned then.
  """
  if not tables.tape:
    return jnp.full_like(state.cursor, -1), None
  forced = jnp.where(state.done, -1, at(tables.tape.tokens, state.cursor))
  return forced, banned(tables, budgets, state, forced < 0)


def advance(
    tables: BudgetTables, budgets: Budgets, state: BudgetState,
    token: jax.Array, was_forced: jax.Array,
) -> tuple[BudgetState, Emit]:
  """Advances each row by its chosen token.

  A sampled token that completes a delimiter ends the thinking or becomes a
  wait. It is kept if the delimiter is the beginning of `end`. Else it is
  retracted together with the earlier tokens that the delimiter stands in. The
  step then emits nothing (`refeed`), and the next ones force what stood before
  the delimiter in its first token, and the string that takes its place.

  Args:
    tables, budgets, state: as given to `plan`.
    token: [B] int32, the forced token where there was one, else the choice.
    was_forced: [B] bool, rows in which the token was forced.

  Returns:
    The next state, and the step's output. A row that is done emits nothing.
  """
  active = ~state.done
  sampled = active & ~was_forced
  stopped = sampled & stop_hits(tables, budgets, token[:, None])[:, 0]
  state = dataclasses.replace(
      state, recent=append(state.recent, token, active),
      num_tokens=state.num_tokens + active, draws=state.draws + active,
      answer=state.answer + (sampled & (state.phase != THINK)))
  retracted = jnp.zeros_like(token)
  if tables.used:
    state, stopped, retracted = _follow(
        tables, budgets, state, token, sampled, stopped)
  # In this order: a stop id ends a row before its length does, and a row that
  # has ended is not closed at a maximum.
  state = _finish(budgets, state, stopped)
  state = _at_maximum(tables, budgets, state)
  refeed = retracted > 0
  provenance = jnp.where(sampled & ~refeed, SAMPLED, NONE)
  return state, Emit(
      token=token,
      provenance=jnp.where(active & was_forced, FORCED, provenance),
      # The delimiter's last token was never recorded, so one less is dropped.
      dropped=jnp.maximum(retracted - 1, 0), refeed=refeed)


def end(state: BudgetState, rows: jax.Array, reason: int) -> BudgetState:
  """Ends rows [B] bool for a reason, those that are done included."""
  return dataclasses.replace(
      state, phase=jnp.where(rows, DONE, state.phase),
      finish_reason=jnp.where(rows, reason, state.finish_reason))


def _follow(
    tables: BudgetTables, budgets: Budgets, state: BudgetState,
    token: jax.Array, sampled: jax.Array, stopped: jax.Array,
) -> tuple[BudgetState, jax.Array, jax.Array]:
  """Follows the thinking of each row by the token that was appended.

  Args:
    tables, budgets, state: as given to `plan`, the token appended.
    token, sampled, stopped: [B], it; if it was sampled; if it is a stop id.

  Returns:
    The state; rows that the token stops; and how many tokens were retracted,
    the last one included, [B] int32.
  """
  matcher, tape = tables.matcher, tables.tape
  assert matcher and tape
  found = _events(matcher, state, token, sampled, stopped)
  active = ~state.done
  state = dataclasses.replace(state, sizes=append(
      state.sizes, found.size, active))
  # A wait takes the delimiter away even if the delimiter would begin `end`.
  waited = found.matched & (state.waits_left > 0)
  ended = found.matched & ~waited
  kept = ended & found.kept
  count, head = _span(state, found.back)
  retracted = jnp.where(found.matched & ~kept, count, 0)
  head_at = _head(matcher, tape, state, retracted, head)
  # The end of `start` alone is no thinking.
  head_at = head_at + jnp.where(
      (head_at > 0) & (head == 0), tape.heads_end - 1, 0)

  thinks = jnp.where(
      _in_head(tape, state.cursor, 2), _in_head(tape, state.cursor, 1),
      jnp.where(found.started, found.size > 0, state.phase == THINK))
  thinking = state.thinking + (active & ~found.stopped & thinks)
  # Whole tokens of the delimiter were counted as they came, and are no
  # thinking. A head that is forced counts as it comes out.
  left = thinking - count + (kept & (head > 0))

  # Where a delimiter was kept, the rest of `end` is forced behind it.
  written = jnp.where(kept, jnp.minimum(found.back, tape.rests.size - 1), 0)
  target = jnp.where(
      waited, _wait_cursor(tape, budgets, state), at(tape.rests, written))
  cursor, resume = _cursor(
      tape, state, ~sampled, found.matched, head_at, target)
  phase = jnp.where(ended, ANSWER, jnp.where(
      found.started, THINK, state.phase))
  # Nothing matches across a forced token or a retraction.
  node = jnp.where(sampled & ~waited, found.node, matcher.think)
  return dataclasses.replace(
      state, phase=phase, cursor=cursor, resume=resume,
      node=jnp.where(phase == ANSWER, delimiters.ANSWER, node),
      recent=retract(state.recent, retracted),
      sizes=retract(state.sizes, retracted),
      thinking=jnp.where(found.matched, left, thinking),
      steps=state.steps + found.steps,
      answer=jnp.where(found.started, 0, state.answer),
      num_tokens=state.num_tokens - retracted,
      waits_left=state.waits_left - waited,
      wait_count=state.wait_count + waited,
      just_waited=waited | state.just_waited & ~sampled,
      think_end=jnp.where(ended, NATURAL, state.think_end)
  ), found.stopped, retracted


@dataclasses.dataclass(frozen=True)
class _Events:
  """Events of one step, [B] each; see `Matcher.effects`."""

  node: jax.Array  # The automaton's next state.
  size: jax.Array  # Symbols of the token that may be thinking.
  started: jax.Array
  matched: jax.Array
  back: jax.Array
  kept: jax.Array
  steps: jax.Array
  stopped: jax.Array


def _events(
    matcher: Matcher, state: BudgetState, token: jax.Array,
    sampled: jax.Array, stopped: jax.Array,
) -> _Events:
  """Looks up what the sampled tokens complete; arguments as of `_follow`."""
  step = lambda table: at(table, (state.node, token)).astype(jnp.int32)
  event = jnp.where(sampled, step(matcher.event), 0)
  started, behind, matched, back, kept, steps = jnp.unstack(
      rows_of(matcher.effects, event), axis=1)
  # A delimiter may be a stop id, too: then it ends the thinking, not the row.
  stopped = stopped & (matched == 0)
  return _Events(
      node=step(matcher.next), started=(started > 0) & ~stopped,
      size=jnp.where(started > 0, behind, at(matcher.symbols, token)),
      matched=matched > 0, back=back, kept=kept > 0,
      steps=jnp.where(stopped, 0, steps), stopped=stopped)


def _cursor(
    tape: Tape, state: BudgetState, forced: jax.Array,
    matched: jax.Array, head_at: jax.Array, target: jax.Array,
) -> tuple[jax.Array, jax.Array]:
  """Moves the cursors along the tape; returns `cursor` and `resume`.

  Args:
    tape, state: before the step.
    forced, matched: [B] bool, a token was forced; a delimiter was completed.
    head_at: [B] int32, where the text before the delimiter is; 0 for none.
    target: [B] int32, where the string is that follows the delimiter.
  """
  cursor = state.cursor + forced
  over = at(tape.tokens, cursor) < 0
  cursor = jnp.where(over, state.resume, cursor)
  resume = jnp.where(over, 0, state.resume)
  headed = head_at > 0
  return (jnp.where(matched, jnp.where(headed, head_at, target), cursor),
          jnp.where(matched, jnp.where(headed, target, 0), resume))


def _span(
    state: BudgetState, symbols: jax.Array,
) -> tuple[jax.Array, jax.Array]:
  """Finds the tokens that the last `symbols` [B] of each row stand in.

  Returns:
    [B] int32 each: how many tokens these are, 0 for no symbols; and the symbols
    of thinking before them in the first of the tokens.
  """
  sizes = state.sizes
  behind = jax.lax.cumsum(sizes, axis=1, reverse=True) - sizes
  inside = behind < symbols[:, None]
  return jnp.sum(inside, axis=1), jnp.sum(
      jnp.where(inside, sizes, 0), axis=1) - symbols


def _head(
    matcher: Matcher, tape: Tape, state: BudgetState, retracted: jax.Array,
    symbols: jax.Array,
) -> jax.Array:
  """Finds the spelling of what stands before a delimiter in its first token.

  Args:
    matcher, tape, state: with the delimiter's tokens.
    retracted: [B] int32, tokens to retract.
    symbols: [B] int32, of the first of them before the delimiter, see `_span`.

  Returns:
    [B] int32, its index in the tape; 0 for none.
  """
  heads = tape.heads
  if not heads.shape[1]:
    return jnp.zeros_like(symbols)
  places = jnp.arange(state.recent.shape[1], 0, -1) == retracted[:, None]
  pick = lambda hit, values: jnp.sum(jnp.where(hit, values, 0), axis=1)
  first = pick(places, state.recent)
  # Of the token that completed `start`, the end of that is there, too.
  symbols = symbols + at(matcher.symbols, first) - pick(places, state.sizes)
  hit = (heads[0] == first[:, None]) & (heads[1] == symbols[:, None]) & (
      retracted > 0)[:, None]
  return pick(hit, heads[2])


def _in_head(tape: Tape, cursor: jax.Array, times: int) -> jax.Array:
  """Returns [B] bool, the token to force is before a retracted delimiter.

  Args:
    tape, cursor: which token it is.
    times: 1 for the heads that are thinking, 2 for the others, too.
  """
  return (cursor > 0) & (cursor <= times * (tape.heads_end - 1))


def _wait_cursor(
    tape: Tape, budgets: Budgets, state: BudgetState,
) -> jax.Array:
  """Returns [B] int32, where the text of a row's next wait begins."""
  which = state.wait_count % tape.waits.size
  if budgets.wait_order is not None:
    chosen = jnp.sum(budgets.wait_order >= 0, axis=1)
    turn = state.wait_count % jnp.maximum(chosen, 1)
    # A select as a sum over a mask.
    own = jnp.sum(jnp.where(
        jnp.arange(budgets.wait_order.shape[1]) == turn[:, None],
        budgets.wait_order, 0), axis=1)
    which = jnp.where(chosen > 0, own, which)
  return at(tape.waits, which)


def _finish(
    budgets: Budgets, state: BudgetState, stopped: jax.Array,
) -> BudgetState:
  """Ends rows at a stop id, or at `max_tokens`."""
  full = ~state.done & (state.num_tokens >= budgets.max_tokens)
  by_stop = jnp.where(state.think_end == CLOSED, BUDGET, EOS)
  reason = jnp.where(full, LENGTH, state.finish_reason)
  return dataclasses.replace(
      state, phase=jnp.where(stopped | full, DONE, state.phase),
      finish_reason=jnp.where(stopped, by_stop, reason))


def _at_maximum(
    tables: BudgetTables, budgets: Budgets, state: BudgetState,
) -> BudgetState:
  """Closes, or truncates, the rows whose thinking has reached its maximum."""
  matcher, tape = tables.matcher, tables.tape
  if not (matcher and tape):
    return state
  limit = budgets.max_thinking_tokens
  full = (limit >= 0) & (state.thinking >= limit)
  if budgets.max_thinking_steps is not None:
    steps = budgets.max_thinking_steps
    full = full | (steps >= 0) & (state.steps >= steps)
  # The text before a retracted delimiter is not lost: it comes out first.
  rows = (state.phase == THINK) & full & ~_in_head(tape, state.cursor, 2)
  close = rows & ~budgets.truncate
  # If the model has begun to write `end` itself, only its rest is forced; the
  # whole tokens of the beginning were no thinking.
  begun = at(matcher.begun, state.node)
  count, head = _span(state, begun)
  # The closing on the tape is newline and `end`. The newline is left out where
  # the text ends in one, and where `end` has begun.
  rest = (begun > 0) | at(matcher.newline_ends, state.last)
  cursor = jnp.where(rest, at(tape.rests, begun), tape.close)
  ended = jnp.where(close, ANSWER, DONE)
  return dataclasses.replace(
      state, phase=jnp.where(rows, ended, state.phase),
      cursor=jnp.where(close, cursor, state.cursor),
      resume=jnp.where(close, tape.final, state.resume),
      node=jnp.where(close, delimiters.ANSWER, state.node),
      thinking=state.thinking - jnp.where(close, count - (head > 0), 0),
      think_end=jnp.where(close, CLOSED, state.think_end),
      finish_reason=jnp.where(rows & ~close, LENGTH, state.finish_reason))
