"""What budget forcing is given and keeps of each row: constants and records.

The machine that reads and moves them is `budget`.

  B: rows    W: window of recent tokens    K: stop ids of a row
"""

import dataclasses
import functools

import jax

# Phases.
PRE, THINK, ANSWER, DONE = range(4)
# Why a row ended. STOP is set by the host, when a stop string was found, and
# ABORTED too. FAILED: its logits were not numbers.
RUNNING, EOS, BUDGET, LENGTH, STOP, FAILED, ABORTED = range(7)
# How the thinking ended.
OPEN, NATURAL, CLOSED = range(3)
# Where a token came from; 3 is reserved for tools.
NONE, SAMPLED, FORCED = range(3)


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["max_thinking_tokens", "min_thinking_tokens", "num_waits",
                 "max_tokens", "truncate", "stop_ids", "wait_order",
                 "suppress", "max_thinking_steps"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class Budgets:
  """Per-row limits; data, so that a change compiles nothing.

  Attributes:
    max_thinking_tokens: [B] int32, thinking is closed there; -1 for never.
    min_thinking_tokens: [B] int32, no delimiter or stop id before it.
    num_waits: [B] int32, how many delimiters are replaced by the wait text.
    max_tokens: [B] int32, at least 1: all tokens of the completion.
    truncate: [B] bool, end the row at the maximum instead of closing.
    stop_ids: [B, K] int32, what ends the row besides the tables' stop ids; -1
      for none. None: nothing does, in any row.
    wait_order: [B, K] int32, which of the tables' wait texts the row's waits
      take, in turn, over and over; -1 behind the last. None, or none in a row:
      all of them, in turn.
    suppress: [B] bool, the tables' reflections are not sampled in thinking.
      None: no row asks for it.
    max_thinking_steps: [B] int32, thinking is closed behind so many steps; -1
      for never. None: in no row.
  """

  max_thinking_tokens: jax.Array
  min_thinking_tokens: jax.Array
  num_waits: jax.Array
  max_tokens: jax.Array
  truncate: jax.Array
  stop_ids: jax.Array | None = None
  wait_order: jax.Array | None = None
  suppress: jax.Array | None = None
  max_thinking_steps: jax.Array | None = None


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["phase", "cursor", "recent", "run", "thinking", "steps",
                 "answer", "num_tokens", "draws", "waits_left", "wait_count",
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
    steps: of thinking, that were ended.
    answer: tokens sampled outside thinking, a stop id included; of a row that
      thinks, after its thinking only.
    num_tokens: tokens of the completion so far.
    draws: steps that the row took. Equal to `num_tokens` until something is
      dropped, and never repeated: the position to fold into a row's key.
    waits_left, wait_count: waits still to come, and made.
    just_waited: [B] bool, no token was sampled since the last wait.
    think_end: OPEN, NATURAL or CLOSED (by the maximum).
    finish_reason: RUNNING, EOS, BUDGET (stopped after a maximum had closed
      the thinking), LENGTH, STOP, FAILED or ABORTED.
  """

  phase: jax.Array
  cursor: jax.Array
  recent: jax.Array
  run: jax.Array
  thinking: jax.Array
  steps: jax.Array
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
