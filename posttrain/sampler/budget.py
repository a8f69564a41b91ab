"""Budget forcing: a state machine over rows that steers the decode loop.

The machine never sees the model. One iteration of the decode loop is

  logits -> `plan` -> choose a token -> `advance` -> the token to feed next

and the record of a row is assembled afterwards: per step, first retract the
last `emit.dropped` tokens, then append `emit.token` if `emit.provenance` is
not `NONE`. The token to feed next is `state.last` at position
`prompt_length + state.num_tokens - 1`; cached keys at that position or later
belong to retracted tokens and have to be invalidated first.

A row is before its thinking (`PRE`), in it (`THINK`), past it (`ANSWER`) or
`DONE`; thinking that has ended is not entered again. `cursor` points into the
concatenated strings that can be forced; a row forces tokens while the cursor
points at one. Every rule is a `where` over [B], so budgets are data: changing
them never recompiles. The strings are static: a new tokenizer or other
thinking strings do.

  B: rows    V: vocabulary    W: window of recent tokens    C: forced strings

Reference: s1, https://arxiv.org/abs/2501.19393, section 3.1, and its public
code. What differs from it, and why: docs/budget_forcing.md.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from posttrain import sharding
from posttrain.sampler import budget_tables

BudgetTables = budget_tables.BudgetTables

# Phases.
PRE, THINK, ANSWER, DONE = range(4)
# Why a row ended. STOP is set by the host, when a stop string was found.
RUNNING, EOS, BUDGET, LENGTH, STOP = range(5)
# How the thinking ended.
OPEN, NATURAL, CLOSED = range(3)
# Where a token came from; 3 is reserved for tools.
NONE, SAMPLED, FORCED = range(3)


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["max_thinking_tokens", "min_thinking_tokens", "num_waits",
                 "max_tokens", "truncate"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class Budgets:
  """Per-row limits; data, so that a change compiles nothing.

  Attributes:
    max_thinking_tokens: [B] int32, thinking is closed there; -1 for never.
    min_thinking_tokens: [B] int32, no delimiter or stop id before it.
    num_waits: [B] int32, how many delimiters are replaced by the wait text.
    max_tokens: [B] int32, at least 1: all tokens of the completion.
    truncate: [B] bool, end the row at the maximum instead of closing.
  """

  max_thinking_tokens: jax.Array
  min_thinking_tokens: jax.Array
  num_waits: jax.Array
  max_tokens: jax.Array
  truncate: jax.Array


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["phase", "cursor", "recent", "run", "thinking", "answer",
                 "num_tokens", "draws", "waits_left", "wait_count",
                 "just_waited", "think_end", "finish_reason"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class BudgetState:
  """Where each row stands; all [B] int32 unless stated.

  Attributes:
    phase: PRE, THINK, ANSWER or DONE.
    cursor: index into `tables.tape` of the token to force next.
    recent: [B, W], the last tokens of the row, its last prompt token among
      them; -1 where unknown.
    run: tokens sampled in a row since thinking began, a token was forced or
      something was dropped: a match never reaches further back.
    thinking: thinking tokens, as docs/budget_forcing.md counts them.
    answer: tokens sampled outside thinking, a stop id included; of a row that
      thinks, after its thinking only.
    num_tokens: tokens of the completion so far.
    draws: steps that the row took. Equal to `num_tokens` until something is
      dropped, and never repeated: the position to fold into a row's key.
    waits_left, wait_count: waits still to come, and made.
    just_waited: [B] bool, no token was sampled since the last wait.
    think_end: OPEN, NATURAL or CLOSED (by the maximum).
    finish_reason: RUNNING, EOS, BUDGET (stopped after a maximum had closed
      the thinking), LENGTH or STOP.
  """

  phase: jax.Array
  cursor: jax.Array
  recent: jax.Array
  run: jax.Array
  thinking: jax.Array
  answer: jax.Array
  num_tokens: jax.Array
  draws: jax.Array
  waits_left: jax.Array
  wait_count: jax.Array
  just_waited: jax.Array
  think_end: jax.Array
  finish_reason: jax.Array

  @property
  def last(self) -> jax.Array:
    """[B] int32, the last token of the row: the one to feed next."""
    return self.recent[:, -1]

  @property
  def done(self) -> jax.Array:
    """[B] bool."""
    return self.phase == DONE


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["token", "provenance", "dropped", "refeed"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class Emit:
  """What one step adds to the record of each row.

  Attributes:
    token: [B] int32, meaningless where `provenance` is NONE.
    provenance: [B] int32, NONE, SAMPLED or FORCED. A forced token may stand
      in place of a sampled one, so its logprob is not that of the choice.
    dropped: [B] int32, earlier tokens to retract before.
    refeed: [B] bool, nothing was emitted and the row goes on: a delimiter was
      dropped and there is no wait text. The next step feeds `state.last`
      again, at its own position.
  """

  token: jax.Array
  provenance: jax.Array
  dropped: jax.Array
  refeed: jax.Array

  @property
  def keep(self) -> jax.Array:
    """[B] bool, the step emits a token."""
    return self.provenance != NONE


def init(
    tables: BudgetTables, budgets: Budgets, in_thinking: jax.Array,
    last_prompt_token: jax.Array, done: jax.Array,
) -> BudgetState:
  """The state after the prompt.

  Args:
    tables, budgets: the strings, and the limits of each row.
    in_thinking: [B] bool, the row begins inside an open thinking section. In
      one that does not, thinking begins when the model has sampled
      `tables.start` whole: never, if that is empty.
    last_prompt_token: [B] int32.
    done: [B] bool, padding rows that generate nothing.
  """
  zeros = jnp.zeros_like(last_prompt_token)
  first = zeros + (
      jnp.where(in_thinking, THINK, PRE) if tables.used else ANSWER)
  recent = jnp.broadcast_to(
      last_prompt_token[:, None], (*last_prompt_token.shape, tables.window))
  recent = jnp.where(jnp.arange(tables.window) < tables.window - 1, -1, recent)
  state = BudgetState(
      phase=jnp.where(done, DONE, first), cursor=zeros, recent=recent,
      run=zeros, thinking=zeros, answer=zeros, num_tokens=zeros, draws=zeros,
      waits_left=budgets.num_waits, wait_count=zeros, just_waited=zeros != 0,
      think_end=zeros, finish_reason=zeros)
  return _at_maximum(tables, budgets, state)


def plan(
    tables: BudgetTables, budgets: Budgets, state: BudgetState,
) -> tuple[jax.Array, jax.Array | None]:
  """What the next choice has to obey.

  Returns:
    forced: [B] int32, the token that must be emitted, or -1. Always -1 in a
      row that is done.
    banned: [B, V] bool, ids that may not be sampled; None if thinking is
      unused, when nothing ever is. Cheap to build, and fused into whatever
      reads it: a handful of comparisons.
  """
  forced = jnp.where(state.done, -1, tables.forced_at(state.cursor))
  if not tables.used:
    return forced, None
  in_thinking = state.phase == THINK
  after_wait = in_thinking & state.just_waited
  bans: dict[int, jax.Array] = {}

  def ban(token: int, rows: jax.Array) -> None:
    bans[token] = bans[token] | rows if token in bans else rows

  for token in tables.stop_ids:
    short = state.thinking < budgets.min_thinking_tokens
    ban(token, after_wait | in_thinking & short)
  for delimiter in tables.delimiters:
    # Sampled now, the last token would complete the delimiter and end a
    # thinking section without the delimiter's other tokens.
    head = delimiter[:-1]
    short = state.thinking - len(head) < budgets.min_thinking_tokens
    ban(delimiter[-1], in_thinking & short & _ends_in(state, head))
    ban(delimiter[0], after_wait)
  ids = jnp.arange(tables.vocab_size)
  banned = functools.reduce(
      jnp.logical_or,
      (rows[:, None] & (ids == token) for token, rows in bans.items()))
  return forced, banned


def advance(
    tables: BudgetTables, budgets: Budgets, state: BudgetState,
    token: jax.Array, was_forced: jax.Array,
) -> tuple[BudgetState, Emit]:
  """Takes the chosen token of each row into account.

  A sampled token that completes a delimiter ends the thinking or becomes a
  wait. It is then kept (if the delimiter begins `end`), or retracted together
  with the delimiter's earlier tokens, and the first token of the string to
  force takes its place in the same step: a forced token needs no logits. With
  an empty wait text nothing takes its place (`refeed`), and the next token is
  sampled from the same context with the delimiters' first tokens banned; that
  is right for delimiters of any length.

  Args:
    tables, budgets, state: as given to `plan`.
    token: [B] int32, the forced token where there was one, else the choice.
    was_forced: [B] bool.

  Returns:
    The next state and what to record. A row that is done emits nothing.
  """
  active = ~state.done
  sampled = active & ~was_forced
  draws = state.draws + active
  state = _append(state, token, active, sampled)
  matched, kept = _match(tables, state, sampled & (state.phase == THINK))
  stopped = sampled & (matched == 0) & _isin(token, tables.stop_ids)
  started = sampled & ~stopped & (state.phase == PRE) & _ends_in(
      state, tables.start) if tables.start else jnp.zeros_like(active)
  thought = active & (state.phase == THINK) & ~stopped
  outside = sampled & (state.phase != THINK)
  waited = (matched > 0) & (state.waits_left > 0)
  ended = (matched > 0) & ~waited
  retract = matched * (waited | ended & ~kept)

  phase = jnp.where(started, THINK, jnp.where(ended, ANSWER, state.phase))
  cursor = jnp.where(was_forced & active, state.cursor + 1, state.cursor)
  cursor = jnp.where(waited, tables.wait_cursor, cursor)
  cursor = jnp.where(
      ended, tables.end_cursor + jnp.where(kept, matched, 0), cursor)
  state = dataclasses.replace(
      _retract(tables, state, retract), phase=phase, cursor=cursor,
      draws=draws, thinking=state.thinking + thought - matched,
      answer=jnp.where(started, 0, state.answer + outside),
      run=jnp.where(started | (retract > 0), 0, state.run),
      waits_left=state.waits_left - waited,
      wait_count=state.wait_count + waited,
      just_waited=waited | state.just_waited & ~sampled,
      think_end=jnp.where(ended, NATURAL, state.think_end))
  substitute = tables.forced_at(state.cursor)
  replaced = (retract > 0) & (substitute >= 0)
  state = _emit_substitute(state, substitute, replaced, waited)
  state = _finish(budgets, state, stopped)
  state = _at_maximum(tables, budgets, state)

  provenance = jnp.where(sampled & (retract == 0), SAMPLED, NONE)
  provenance = jnp.where(
      replaced | active & was_forced, FORCED, provenance)
  return state, Emit(
      token=jnp.where(replaced, substitute, token), provenance=provenance,
      dropped=jnp.maximum(retract - 1, 0),
      refeed=(retract > 0) & ~replaced)


def stop(state: BudgetState, rows: jax.Array) -> BudgetState:
  """Ends rows from outside: the host found a stop string in them.

  Args:
    state: the state between two steps.
    rows: [B] bool; rows that are done already stay as they are.
  """
  rows = rows & ~state.done
  return dataclasses.replace(
      state, phase=jnp.where(rows, DONE, state.phase),
      finish_reason=jnp.where(rows, STOP, state.finish_reason))


def _isin(token: jax.Array, ids: tuple[int, ...]) -> jax.Array:
  """[B] bool, the token is one of a few static ids."""
  hits = (token == i for i in ids)
  return functools.reduce(jnp.logical_or, hits, jnp.zeros_like(token) != 0)


def _ends_in(state: BudgetState, ids: tuple[int, ...]) -> jax.Array:
  """[B] bool, the row ends in `ids`, all of them sampled and in one run."""
  hits = (state.recent[:, i - len(ids)] == t for i, t in enumerate(ids))
  return functools.reduce(jnp.logical_and, hits, state.run >= len(ids))


def _append(
    state: BudgetState, token: jax.Array, active: jax.Array,
    sampled: jax.Array,
) -> BudgetState:
  recent = jnp.concatenate([state.recent[:, 1:], token[:, None]], axis=1)
  return dataclasses.replace(
      state, recent=jnp.where(active[:, None], recent, state.recent),
      run=jnp.where(sampled, state.run + 1, 0),
      num_tokens=state.num_tokens + active)


def _match(
    tables: BudgetTables, state: BudgetState, rows: jax.Array,
) -> tuple[jax.Array, jax.Array]:
  """Length of the delimiter that the row ends in, 0 for none.

  Of several that end in the same token, the longest. Also returns whether it
  is the beginning of `end`, so that it stays where it is.
  """
  matched = jnp.zeros_like(state.run)
  kept = rows & False
  for delimiter in sorted(tables.delimiters, key=len):
    hit = rows & _ends_in(state, delimiter)
    matched = jnp.where(hit, len(delimiter), matched)
    kept = jnp.where(hit, tables.end[:len(delimiter)] == delimiter, kept)
  return matched, kept


def _retract(
    tables: BudgetTables, state: BudgetState, count: jax.Array,
) -> BudgetState:
  """Takes back the last `count` [B] tokens of each row."""
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
  """Appends the first forced token in place of a retracted delimiter."""
  replaced = _append(state, token, rows, rows & False)
  return dataclasses.replace(
      replaced, run=state.run, cursor=state.cursor + rows,
      thinking=state.thinking + (rows & waited))


def _finish(
    budgets: Budgets, state: BudgetState, stopped: jax.Array,
) -> BudgetState:
  """Ends rows at a stop id, else at their last token."""
  full = ~state.done & (state.num_tokens >= budgets.max_tokens)
  by_stop = jnp.where(state.think_end == CLOSED, BUDGET, EOS)
  reason = jnp.where(full, LENGTH, state.finish_reason)
  return dataclasses.replace(
      state, phase=jnp.where(stopped | full, DONE, state.phase),
      finish_reason=jnp.where(stopped, by_stop, reason))


def _at_maximum(
    tables: BudgetTables, budgets: Budgets, state: BudgetState,
) -> BudgetState:
  """Closes (or truncates) the rows whose thinking has reached its maximum."""
  if not tables.used:
    return state
  limit = budgets.max_thinking_tokens
  rows = (state.phase == THINK) & (limit >= 0) & (state.thinking >= limit)
  close = rows & ~budgets.truncate
  # A model that has begun to write the delimiter itself is helped to finish
  # it; what it has written of it was no thinking.
  begun = jnp.zeros_like(state.run)
  for length in range(1, len(tables.end)):
    begun = jnp.where(_ends_in(state, tables.end[:length]), length, begun)
  newline_ends = jnp.asarray(tables.newline_ends)
  newline = newline_ends.at[state.last].get(
      mode="clip", out_sharding=sharding.spec("batch"))
  skip = jnp.where(
      (begun > 0) | newline, len(tables.newline), 0) + begun
  ended = jnp.where(close, ANSWER, DONE)
  return dataclasses.replace(
      state, phase=jnp.where(rows, ended, state.phase),
      cursor=jnp.where(close, tables.close_cursor + skip, state.cursor),
      thinking=state.thinking - jnp.where(close, begun, 0),
      think_end=jnp.where(close, CLOSED, state.think_end),
      finish_reason=jnp.where(rows & ~close, LENGTH, state.finish_reason))
