"""Budget forcing: a state machine of each row, inside the decode loop.

The machine never sees the model. One step of the decode loop is

  logits -> `plan` -> choose a token -> `advance` -> the token to feed next

The record of a row is assembled afterwards: for each step, first retract the
last `emit.dropped` tokens, then append `emit.token` if `emit.provenance` is
not `NONE`. The token to feed next is `state.last` at position
`prompt_length + state.num_tokens - 1`. Cached keys at that position or later
belong to retracted tokens, and have to be invalidated first.

A row is before its thinking (`PRE`), in it (`THINK`), past it (`ANSWER`) or
`DONE`; thinking that has ended is not entered again. `cursor` points into the
tape, the strings that can be forced, one after the other. A row forces tokens
while its cursor points at one. Every rule is a `where` over [B], so budgets are
data, and changing them never recompiles. The strings are static: another
tokenizer, or other thinking strings, do recompile.

  B: rows    V: vocabulary    W: window of recent tokens    C: forced strings

Reference: s1, https://arxiv.org/abs/2501.19393, section 3.1, and its public
code. What differs from it, and why: docs/budget_forcing.md.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from posttrain import sharding
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
    STOP,
    THINK,
    Budgets,
    BudgetState,
    Emit,
)
from posttrain.sampler.budget_tables import BudgetTables


def init(
    tables: BudgetTables, budgets: Budgets, in_thinking: jax.Array,
    last_prompt_token: jax.Array, done: jax.Array,
) -> BudgetState:
  """Makes the state that rows have after their prompts.

  Args:
    tables, budgets: the strings, and the limits of each row.
    in_thinking: [B] bool, the row begins inside an open thinking section. In
      the others thinking begins when the model has sampled `tables.start`
      whole; never, if that is empty.
    last_prompt_token: [B] int32.
    done: [B] bool, padding rows that generate nothing.
  """
  zeros = jnp.zeros_like(last_prompt_token)
  first = zeros + (
      jnp.where(in_thinking, THINK, PRE) if tables.used else ANSWER)
  recent = jnp.broadcast_to(
      last_prompt_token[:, None], (*last_prompt_token.shape, tables.window))
  # Only the last prompt token is known: a newline may end in it. A delimiter
  # is not matched across the prompt's end, as `run` is 0.
  recent = jnp.where(jnp.arange(tables.window) < tables.window - 1, -1, recent)
  state = BudgetState(
      phase=jnp.where(done, DONE, first), cursor=zeros, recent=recent,
      run=zeros, thinking=zeros, steps=zeros, answer=zeros, num_tokens=zeros,
      draws=zeros,
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
    banned: [B, V] bool, ids that may not be sampled. None if thinking is
      unused, as nothing is banned then.
  """
  forced = jnp.where(state.done, -1, tables.forced_at(state.cursor))
  if not tables.used:
    return forced, None
  in_thinking = state.phase == THINK
  # Behind a wait the model has to go on for one token at least, as in s1's
  # public code, which samples there with min_tokens=1.
  after_wait = in_thinking & state.just_waited
  # [B] bool by token id: a few comparisons with `ids`, which fuse into the
  # program that reads the [B, V] mask, in place of a scatter.
  bans: dict[int, jax.Array] = {}

  def ban(token: int, rows: jax.Array) -> None:
    bans[token] = bans[token] | rows if token in bans else rows

  short = state.thinking < budgets.min_thinking_tokens
  no_stop = after_wait | in_thinking & short
  for token in tables.stop_ids:
    ban(token, no_stop)
  for delimiter in tables.delimiters:
    # The delimiter's other tokens do not count as thinking. If its last token
    # were sampled now, the section would end with `left` thinking tokens.
    head = delimiter[:-1]
    left = state.thinking - len(head)
    ban(delimiter[-1], in_thinking & _ends_in(state, head)
        & (left < budgets.min_thinking_tokens))
    ban(delimiter[0], after_wait)
  ids = jnp.arange(tables.vocab_size)
  banned = functools.reduce(
      jnp.logical_or,
      (rows[:, None] & (ids == token) for token, rows in bans.items()))
  if budgets.stop_ids is not None:
    own = jnp.any(budgets.stop_ids[:, :, None] == ids, axis=1)
    banned = banned | no_stop[:, None] & own
  if budgets.suppress is not None and tables.reflections is not None:
    rows = in_thinking & budgets.suppress
    banned = banned | rows[:, None] & jnp.asarray(tables.reflections)
  return forced, banned


def advance(
    tables: BudgetTables, budgets: Budgets, state: BudgetState,
    token: jax.Array, was_forced: jax.Array,
) -> tuple[BudgetState, Emit]:
  """Advances each row by its chosen token.

  A sampled token that completes a delimiter ends the thinking or becomes a
  wait. It is kept if the delimiter is the beginning of `end`. Else it is
  retracted together with the delimiter's earlier tokens, and the first token of
  the string to force takes its place in the same step: a forced token needs no
  logits. With an empty wait text nothing takes its place (`refeed`), and the
  next token is sampled from the same context with the delimiters' first tokens
  banned, which is right for delimiters of any length.

  Args:
    tables, budgets, state: as given to `plan`.
    token: [B] int32, the forced token where there was one, else the choice.
    was_forced: [B] bool, rows in which the token was forced.

  Returns:
    The next state, and the step's output. A row that is done emits nothing.
  """
  active = ~state.done
  sampled = active & ~was_forced
  draws = state.draws + active
  state = _append(state, token, active, sampled)
  matched, kept = _match(tables, state, sampled & (state.phase == THINK))
  stops = _is_stop(tables, budgets, token)
  # A delimiter may be a stop id, too: then it ends the thinking, not the row.
  stopped = sampled & (matched == 0) & stops
  started = sampled & ~stopped & (state.phase == PRE) & _ends_in(
      state, tables.start) if tables.start else jnp.zeros_like(active)
  thought = active & (state.phase == THINK) & ~stopped
  outside = sampled & (state.phase != THINK)
  # A wait takes the delimiter away even if the delimiter would begin `end`.
  waited = (matched > 0) & (state.waits_left > 0)
  ended = (matched > 0) & ~waited
  retract = matched * (waited | ended & ~kept)

  phase = jnp.where(started, THINK, jnp.where(ended, ANSWER, state.phase))
  # A forced token moves the cursor on along its string. Where a delimiter was
  # kept, the rest of `end` is forced behind it.
  cursor = jnp.where(was_forced & active, state.cursor + 1, state.cursor)
  cursor = jnp.where(waited, _wait_cursor(tables, budgets, state), cursor)
  cursor = jnp.where(
      ended, tables.end_cursor + jnp.where(kept, matched, 0), cursor)
  state = dataclasses.replace(
      _retract(tables, state, retract), phase=phase, cursor=cursor,
      # The delimiter's tokens were counted as they came, and are no thinking.
      draws=draws, thinking=state.thinking + thought - matched,
      steps=state.steps + (
          thought & sampled & (matched == 0) & _ends_step(tables, state)),
      answer=jnp.where(started, 0, state.answer + outside),
      # Nothing matches across the begin of the thinking or a retraction.
      run=jnp.where(started | (retract > 0), 0, state.run),
      waits_left=state.waits_left - waited,
      wait_count=state.wait_count + waited,
      just_waited=waited | state.just_waited & ~sampled,
      think_end=jnp.where(ended, NATURAL, state.think_end))
  substitute = tables.forced_at(state.cursor)
  replaced = (retract > 0) & (substitute >= 0)
  # In this order: a stop id ends a row before its length does, and a row that
  # has ended is not closed at a maximum.
  state = _emit_substitute(state, substitute, replaced, waited)
  state = _finish(budgets, state, stopped)
  state = _at_maximum(tables, budgets, state)

  provenance = jnp.where(sampled & (retract == 0), SAMPLED, NONE)
  provenance = jnp.where(
      replaced | active & was_forced, FORCED, provenance)
  # The delimiter's last token was never recorded, so one less is dropped.
  return state, Emit(
      token=jnp.where(replaced, substitute, token), provenance=provenance,
      dropped=jnp.maximum(retract - 1, 0),
      refeed=(retract > 0) & ~replaced)


def stop(
    state: BudgetState, rows: jax.Array, reason: int = STOP,
) -> BudgetState:
  """Ends rows from outside, as where the host found a stop string.

  Args:
    state: the state between two steps.
    rows: [B] bool; rows that are done already stay as they are.
    reason: their `finish_reason`.
  """
  return end(state, rows & ~state.done, reason)


def end(state: BudgetState, rows: jax.Array, reason: int) -> BudgetState:
  """Ends rows [B] bool for a reason, those that are done included."""
  return dataclasses.replace(
      state, phase=jnp.where(rows, DONE, state.phase),
      finish_reason=jnp.where(rows, reason, state.finish_reason))


def _is_stop(
    tables: BudgetTables, budgets: Budgets, token: jax.Array) -> jax.Array:
  """Returns [B] bool, the token is a stop id, the tables' or the row's own."""
  hits = (token == i for i in tables.stop_ids)
  stops = functools.reduce(jnp.logical_or, hits, jnp.zeros_like(token) != 0)
  if budgets.stop_ids is not None:
    stops = stops | jnp.any(token[:, None] == budgets.stop_ids, axis=1)
  return stops


def _ends_in(state: BudgetState, ids: tuple[int, ...]) -> jax.Array:
  """Returns [B] bool, the row ends in `ids`, all sampled within one run."""
  hits = (state.recent[:, i - len(ids)] == t for i, t in enumerate(ids))
  return functools.reduce(jnp.logical_and, hits, state.run >= len(ids))


def _ends_step(tables: BudgetTables, state: BudgetState) -> jax.Array:
  """Returns [B] bool, the last token ends a step of the thinking."""
  if tables.step_ends is None:
    return state.done & False
  return _ends_in(state, tables.step) | _flag(tables.step_ends, state.last)


def _flag(flags: np.ndarray | jax.Array, tokens: jax.Array) -> jax.Array:
  """Looks up `flags` [V] bool for each token: [B] bool."""
  return jnp.asarray(flags).at[tokens].get(
      mode="clip", out_sharding=sharding.spec("rows"))


def _append(
    state: BudgetState, token: jax.Array, active: jax.Array,
    sampled: jax.Array,
) -> BudgetState:
  """Appends a token to the active rows; `sampled` [B] bool keep their run."""
  recent = jnp.concatenate([state.recent[:, 1:], token[:, None]], axis=1)
  return dataclasses.replace(
      state, recent=jnp.where(active[:, None], recent, state.recent),
      run=jnp.where(sampled, state.run + 1, 0),
      num_tokens=state.num_tokens + active)


def _wait_cursor(
    tables: BudgetTables, budgets: Budgets, state: BudgetState,
) -> jax.Array:
  """Returns [B] int32, where the text of a row's next wait begins."""
  # Selects as sums over a mask: the layout of a gather would be ambiguous.
  pick = lambda values, at: jnp.sum(jnp.where(
      jnp.arange(values.shape[-1]) == at[:, None], values, 0), axis=1)
  which = state.wait_count % len(tables.waits)
  if budgets.wait_order is not None:
    chosen = jnp.sum(budgets.wait_order >= 0, axis=1)
    turn = state.wait_count % jnp.maximum(chosen, 1)
    which = jnp.where(chosen > 0, pick(budgets.wait_order, turn), which)
  return pick(jnp.array(tables.wait_cursors, jnp.int32), which)


def _match(
    tables: BudgetTables, state: BudgetState, rows: jax.Array,
) -> tuple[jax.Array, jax.Array]:
  """Matches the delimiter that each row ends in.

  If several delimiters end in the same token, the longest counts.

  Returns:
    The delimiter's length, [B] int32, 0 for none; and [B] bool, it is the
    beginning of `end`, and so stays where it is.
  """
  matched = jnp.zeros_like(state.run)
  kept = rows & False
  # The longest comes last, and so overwrites the others.
  for delimiter in sorted(tables.delimiters, key=len):
    hit = rows & _ends_in(state, delimiter)
    matched = jnp.where(hit, len(delimiter), matched)
    kept = jnp.where(hit, tables.end[:len(delimiter)] == delimiter, kept)
  return matched, kept


def _retract(
    tables: BudgetTables, state: BudgetState, count: jax.Array,
) -> BudgetState:
  """Retracts the last `count` [B] tokens of each row."""
  # `count` is 0 or the length of a delimiter: a static shift for each length
  # in place of one by a count that differs from row to row.
  recent = state.recent
  for length in {len(delimiter) for delimiter in tables.delimiters}:
    shifted = jnp.pad(
        state.recent[:, :-length], ((0, 0), (length, 0)), constant_values=-1)
    recent = jnp.where((count == length)[:, None], shifted, recent)
  return dataclasses.replace(
      state, recent=recent, num_tokens=state.num_tokens - count)


def _emit_substitute(
    state: BudgetState, token: jax.Array, rows: jax.Array, waited: jax.Array,
) -> BudgetState:
  """Appends the first forced token in place of a retracted delimiter.

  A wait text counts as thinking, `end` does not.
  """
  replaced = _append(state, token, rows, rows & False)
  return dataclasses.replace(
      replaced, run=state.run, cursor=state.cursor + rows,
      thinking=state.thinking + (rows & waited))


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
  if not tables.used:
    return state
  limit = budgets.max_thinking_tokens
  full = (limit >= 0) & (state.thinking >= limit)
  if budgets.max_thinking_steps is not None:
    steps = budgets.max_thinking_steps
    full = full | (steps >= 0) & (state.steps >= steps)
  rows = (state.phase == THINK) & full
  close = rows & ~budgets.truncate
  # If the model has begun to write `end` itself, only its missing tokens are
  # forced; those that it wrote were no thinking.
  begun = jnp.zeros_like(state.run)
  for length in range(1, len(tables.end)):
    begun = jnp.where(_ends_in(state, tables.end[:length]), length, begun)
  # The closing on the tape is newline, `end`, final answer. The newline is left
  # out where the text ends in one, and where `end` has begun.
  newline = _flag(tables.newline_ends, state.last)
  skip = jnp.where(
      (begun > 0) | newline, len(tables.newline), 0) + begun
  ended = jnp.where(close, ANSWER, DONE)
  return dataclasses.replace(
      state, phase=jnp.where(rows, ended, state.phase),
      cursor=jnp.where(close, tables.close_cursor + skip, state.cursor),
      thinking=state.thinking - jnp.where(close, begun, 0),
      think_end=jnp.where(close, CLOSED, state.think_end),
      finish_reason=jnp.where(rows & ~close, LENGTH, state.finish_reason))
