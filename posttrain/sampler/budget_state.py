"""Budgets and state of budget forcing: constants, and arrays of each row.

The state machine that reads and advances them is `budget`.

  B: rows    W: window of recent tokens    K: ids of a row, stop ids or waits
"""

import dataclasses

import jax
import jax.numpy as jnp

from posttrain.sampler.confidence import Running

# Phases of a row, in their order: see `budget`.
PRE, THINK, ANSWER, DONE = range(4)
# Why a row ended. The host sets STOP, where it found a stop string, and
# ABORTED. FAILED: its logits were not finite.
RUNNING, EOS, BUDGET, LENGTH, STOP, FAILED, ABORTED = range(7)
# How the thinking ended.
OPEN, NATURAL, CLOSED = range(3)
# Provenance of a token. The last is of what an episode puts between two turns.
NONE, SAMPLED, FORCED, OBSERVATION = range(4)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Budgets:
  """Budgets of each row; arrays, so that changing them compiles nothing.

  A field that is None is off in every row, and no part of the program.

  Attributes:
    max_thinking_tokens: [B] int32, thinking is closed at this many; -1 for
      never.
    min_thinking_tokens: [B] int32, no delimiter or stop id is sampled before.
    num_waits: [B] int32, how many delimiters are replaced by a wait text.
    max_tokens: [B] int32, at least 1: all tokens of the completion.
    truncate: [B] bool, end the row at the maximum instead of closing.
    stop_ids: [B, K] int32, ids that end the row besides the tables' stop ids;
      -1 for none.
    wait_order: [B, K] int32, indices of the tables' wait texts that the row's
      waits take, in turn, over and over; -1 behind the last. None, or none in
      a row: all of them, in turn.
    suppress: [B] bool, the tables' reflections are not sampled in thinking.
    max_thinking_steps: [B] int32, thinking is closed behind this many steps;
      -1 for never.
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


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class BudgetState:
  """State of each row between two steps; all [B] int32 unless stated.

  Attributes:
    phase: PRE, THINK, ANSWER or DONE.
    cursor: index into the tape of the token to force next; where the tape has
      -1, nothing is forced.
    resume: index into the tape where the cursor goes on behind its string.
    node: state of the delimiters' automaton: what the text ends in, since
      thinking began, a token was forced or tokens were retracted.
    recent: [B, W], the last tokens of the row, its last prompt token among
      them; 0 where unknown.
    sizes: [B, W], the symbols of each: of the token that completed `start`
      those behind it only, as only these are thinking.
    thinking: thinking tokens, as docs/budget_forcing.md counts them.
    steps: steps of thinking that were ended.
    answer: tokens sampled outside thinking, a stop id included; of a row that
      thinks, after its thinking only.
    num_tokens: tokens of the completion so far.
    draws: steps that the row took, the position to fold into a row's key. It
      equals `num_tokens` until tokens are retracted, and never repeats.
    waits_left, wait_count: waits that may still be made, and were made.
    just_waited: [B] bool, no token was sampled since the last wait.
    think_end: OPEN, NATURAL or CLOSED (by the maximum).
    finish_reason: RUNNING, EOS, BUDGET (stopped after a maximum had closed
      the thinking), LENGTH, STOP, FAILED or ABORTED.
    running: entropy and confidence; None where they are off.
  """

  phase: jax.Array
  cursor: jax.Array
  resume: jax.Array
  node: jax.Array
  recent: jax.Array
  sizes: jax.Array
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
  running: Running | None = None

  @property
  def confidence(self) -> Running:
    """Running entropy and confidence, for budget schedules.

    Raises:
      ValueError: they are off.
    """
    if self.running is None:
      raise ValueError(
          "A budget schedule reads state.confidence, and it is off. Set "
          "rollout.confidence_window, or Settings.confidence of an engine.")
    return self.running

  @property
  def last(self) -> jax.Array:
    """[B] int32, the last token of the row: the one to feed next."""
    return self.recent[:, -1]

  @property
  def done(self) -> jax.Array:
    """[B] bool, the row has ended."""
    return self.phase == DONE


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Emit:
  """Output of one step: what it adds to the record of each row.

  Attributes:
    token: [B] int32, meaningless where `provenance` is NONE.
    provenance: [B] int32, NONE, SAMPLED or FORCED.
    dropped: [B] int32, earlier tokens of the record to retract.
    refeed: [B] bool, nothing was emitted and the row goes on: a delimiter was
      retracted. `state.last` is then fed again, at its own position.
  """

  token: jax.Array
  provenance: jax.Array
  dropped: jax.Array
  refeed: jax.Array

  @property
  def keep(self) -> jax.Array:
    """[B] bool, the step emits a token."""
    return self.provenance != NONE


def append(
    recent: jax.Array, new: jax.Array, rows: jax.Array) -> jax.Array:
  """Appends `new` [B] to the last values [B, W] of `rows` [B]."""
  return jnp.where(rows[:, None], jnp.concatenate(
      [recent[:, 1:], new[:, None]], axis=1), recent)


def retract(recent: jax.Array, count: jax.Array) -> jax.Array:
  """Retracts the last `count` [B] of values [B, W]; the first are 0 then."""
  places = jnp.arange(recent.shape[1])
  hit = (places[:, None] - count[:, None, None]) == places
  return jnp.sum(jnp.where(hit, recent[:, None], 0), axis=2)
