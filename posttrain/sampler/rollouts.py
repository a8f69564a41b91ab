"""Rollouts: the sampler's record of completions, as NumPy arrays.

Everything about a completion is recorded when it is sampled. Nothing is derived
from its text later, and its tokens are never encoded again.

  P: prompts    G: samples per prompt    B: completions, P * G
  T: tokens of the longest completion    L: layers    k: experts per token
"""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from posttrain.sampler import budget_state
from posttrain.sampler.requests import Completion

# Names of the numbers of `budget_state`: RUNNING, EOS, BUDGET, LENGTH, STOP,
# FAILED and ABORTED; OPEN, NATURAL and CLOSED.
FINISH_REASONS = (
    "running", "eos", "budget", "length", "stop", "error", "abort")
THINK_ENDS = ("open", "natural", "budget")


@dataclasses.dataclass(frozen=True)
class Rollouts:
  """Completions of a batch of prompts, padded on the right with 0.

  Attributes:
    prompts: the token ids of each row's prompt, [B] ragged.
    tokens: [B, T] int32, behind the prompt, end of text included. Of an episode
      of several turns all that is behind its first prompt, observations too.
    logprobs: [B, T] float32, nats. Of a sampled token under the distribution
      that it was sampled from; of a forced token the model's own (temperature
      1, no truncation, no ban); 0 of an observation.
    provenance: [B, T] int8: 0 padding, 1 sampled, 2 forced, 3 observation.
    lengths: [B] int32, tokens of each completion.
    finish_reason: [B] int8, see `FINISH_REASONS`.
    think_end: [B] int8, see `THINK_ENDS`.
    think_lengths, think_steps, answer_lengths, wait_count: [B] int32, counts,
      see `BudgetState`; of several turns their sums. The reason and the end
      above are those of the last turn.
    prompt_id, sample_id: [B] int32, which completion of which prompt.
    in_thinking: [B] bool, the (first) prompt ends within a thinking section.
    raw: [B, steps] int32, every choice that the loop made, those of tokens
      that were retracted later among them; -1 where there was none. As
      `script` of `Sampler.generate` it replays the rows on the same schedule.
      Of several turns one after the other.
    num_turns: [B] int32, turns of the episode; 0 if it ended before the first.
    stop_reason: [B] int8, why the episode ended, see
      `episodes.protocol.STOP_REASONS`; 0 is "completed".
    experts: [B, T, L, k] uint8 or uint16, of a mixture of experts: those that
      each layer routed the token to when it was fed, numbered from 1; 0 where
      it was not fed, as the last token of a row. None without experts.
    entropy, confidence: [B, T] float32, nats, of the model's own distribution
      where the token stands, see `confidence`. None where they are off.
  """

  prompts: list[list[int]]
  tokens: np.ndarray
  logprobs: np.ndarray
  provenance: np.ndarray
  lengths: np.ndarray
  finish_reason: np.ndarray
  think_end: np.ndarray
  think_lengths: np.ndarray
  think_steps: np.ndarray
  answer_lengths: np.ndarray
  wait_count: np.ndarray
  prompt_id: np.ndarray
  sample_id: np.ndarray
  in_thinking: np.ndarray
  raw: np.ndarray
  num_turns: np.ndarray
  stop_reason: np.ndarray
  experts: np.ndarray | None = None
  entropy: np.ndarray | None = None
  confidence: np.ndarray | None = None

  @property
  def loss_mask(self) -> np.ndarray:
    """[B, T] bool, true on tokens that the policy sampled."""
    return self.provenance == budget_state.SAMPLED

  def completion(self, row: int) -> list[int]:
    """Returns the token ids of one completion."""
    return self.tokens[row, :self.lengths[row]].tolist()

  def finish_name(self, row: int) -> str:
    """Returns a row's finish reason, of `FINISH_REASONS`."""
    return FINISH_REASONS[int(self.finish_reason[row])]


def of_completions(completions: Sequence[Completion]) -> Rollouts:
  """Collects an engine's completions, in the order given."""
  codes = lambda names, field: np.array(
      [names.index(getattr(c, field)) for c in completions], np.int8)
  numbers = lambda values: np.array(list(values), np.int32)
  # One that never ran has none.
  experts = [() if c.experts is None else c.experts for c in completions]
  has_experts = any(c.experts is not None for c in completions)

  def optional(name: str) -> np.ndarray | None:
    found = [getattr(c, name) for c in completions]
    if all(values is None for values in found):
      return None
    return _padded([() if x is None else x for x in found], np.float32)

  return Rollouts(
      prompts=[list(c.request.prompt) for c in completions],
      tokens=_padded([c.tokens for c in completions], np.int32),
      logprobs=_padded([c.logprobs for c in completions], np.float32),
      provenance=_padded([c.provenance for c in completions], np.int8),
      lengths=numbers(len(c.tokens) for c in completions),
      finish_reason=codes(FINISH_REASONS, "finish_reason"),
      think_end=codes(THINK_ENDS, "think_end"),
      think_lengths=numbers(c.think_length for c in completions),
      think_steps=numbers(c.think_steps for c in completions),
      answer_lengths=numbers(c.answer_length for c in completions),
      wait_count=numbers(c.wait_count for c in completions),
      prompt_id=numbers(c.request.prompt_id for c in completions),
      sample_id=numbers(c.request.sample_id for c in completions),
      in_thinking=np.array([bool(c.request.in_thinking) for c in completions]),
      raw=_padded([c.raw for c in completions], np.int32, fill=-1),
      num_turns=np.ones(len(completions), np.int32),
      stop_reason=np.zeros(len(completions), np.int8),
      experts=_padded(experts) if has_experts else None,
      entropy=optional("entropy"), confidence=optional("confidence"))


class Row:
  """Record of one row: the tokens that its steps emitted and kept.

  Attributes:
    columns: a list with a value per token, by its name in the loop's record.
  """

  def __init__(self) -> None:
    self.columns: dict[str, list] = {
        "token": [], "logprob": [], "provenance": []}

  @property
  def tokens(self) -> list[int]:
    """Tokens so far."""
    return self.columns["token"]

  def add(self, record: Mapping[str, np.ndarray]) -> None:
    """Adds steps: [steps, ...] arrays, "dropped" and "raw" among them."""
    dropped = record["dropped"]
    emitted = record["provenance"] != budget_state.NONE
    # Retractions are rare: split at them, extend in slices in between. A step
    # first drops earlier tokens and then emits its own, so it begins a slice.
    start = 0
    for step in (*np.flatnonzero(dropped), dropped.size):
      keep = np.flatnonzero(emitted[start:step]) + start
      for name in record.keys() - {"dropped", "raw"}:
        kept = record[name][keep]
        self.columns.setdefault(name, []).extend(
            kept if kept.ndim > 1 else kept.tolist())
      if step < dropped.size:
        self.cut(len(self.tokens) - int(dropped[step]))
      start = step

  def cut(self, length: int) -> None:
    """Keeps the first `length` tokens."""
    for values in self.columns.values():
      del values[length:]


def _padded(
    rows: Sequence[Sequence | np.ndarray], dtype: type | None = None,
    fill: int = 0,
) -> np.ndarray:
  """Pads ragged rows on the right with `fill` to [B, longest, ...]."""
  filled = next((np.asarray(values, dtype) for values in rows if len(values)),
                np.zeros(0, dtype))
  out: np.ndarray = np.full(
      (len(rows), max(map(len, rows), default=0), *filled.shape[1:]), fill,
      filled.dtype)
  for i, values in enumerate(rows):
    if len(values):
      out[i, :len(values)] = values
  return out
