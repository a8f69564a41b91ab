"""What the policy did, as NumPy records: nothing is re-derived from text.

  B: completions, P * G    T: the longest completion
"""

import dataclasses

import numpy as np

from posttrain.sampler import budget

FINISH_REASONS = {
    budget.RUNNING: "running", budget.EOS: "eos", budget.BUDGET: "budget",
    budget.LENGTH: "length", budget.STOP: "stop"}
THINK_ENDS = {
    budget.OPEN: "open", budget.NATURAL: "natural", budget.CLOSED: "budget"}


@dataclasses.dataclass(frozen=True)
class Rollouts:
  """Completions of a batch of prompts, padded on the right with 0.

  Attributes:
    prompts: the token ids of each row's prompt, [B] ragged.
    tokens: [B, T] int32, what follows the prompt, end of text included.
    logprobs: [B, T] float32, of sampled tokens under the distribution really
      sampled from; 0 for forced tokens.
    provenance: [B, T] int8: 0 padding, 1 sampled, 2 forced.
    lengths: [B] int32, tokens of each completion.
    finish_reason: [B] int8, see `FINISH_REASONS`.
    think_end: [B] int8, see `THINK_ENDS`.
    think_lengths, answer_lengths, wait_count: [B] int32.
    prompt_id, sample_id: [B] int32, which completion of which prompt.
    raw: [B, steps] int32, every choice that the loop made, those dropped
      later among them, -1 where there was none: what `Sampler.generate`
      takes as `script` for a replay on the same schedule.
    experts: [B, T, L, k] uint8 or uint16, of a model that has them: the
      experts that each layer sent a token to when it was fed, numbered from
      1; 0 where it was not fed, as the last token of a row.
  """

  prompts: list[list[int]]
  tokens: np.ndarray
  logprobs: np.ndarray
  provenance: np.ndarray
  lengths: np.ndarray
  finish_reason: np.ndarray
  think_end: np.ndarray
  think_lengths: np.ndarray
  answer_lengths: np.ndarray
  wait_count: np.ndarray
  prompt_id: np.ndarray
  sample_id: np.ndarray
  raw: np.ndarray
  experts: np.ndarray | None = None

  @property
  def loss_mask(self) -> np.ndarray:
    """[B, T] bool, true on tokens that the policy sampled."""
    return self.provenance == budget.SAMPLED

  def completion(self, row: int) -> list[int]:
    """The token ids of one completion."""
    return self.tokens[row, :self.lengths[row]].tolist()

  def finish_name(self, row: int) -> str:
    return FINISH_REASONS[int(self.finish_reason[row])]


@dataclasses.dataclass
class Recorder:
  """Collects the loop's per-step records into rows.

  A row is what its steps emitted, less what a later step took back.
  """

  rows: int

  def __post_init__(self):
    self.tokens: list[list[int]] = [[] for _ in range(self.rows)]
    self.logprobs: list[list[float]] = [[] for _ in range(self.rows)]
    self.provenance: list[list[int]] = [[] for _ in range(self.rows)]
    self.steps: list[list[int]] = [[] for _ in range(self.rows)]
    self.raw: list[np.ndarray] = []
    self.experts: list[np.ndarray] = []

  def add(self, record: dict[str, np.ndarray]) -> None:
    """Takes one chunk of [B, steps] arrays."""
    before = sum(raw.shape[1] for raw in self.raw)
    self.raw.append(record["raw"][:self.rows])
    if "experts" in record:
      self.experts.append(record["experts"][:self.rows])
    for row in range(self.rows):
      dropped = record["dropped"][row]
      emitted = record["provenance"][row] != budget.NONE
      # Retractions are rare: split at them, extend in slices in between.
      start = 0
      for step in (*np.flatnonzero(dropped), dropped.size):
        keep = np.flatnonzero(emitted[start:step]) + start
        self._extend(record, row, keep)
        self.steps[row].extend((keep + before).tolist())
        if step < dropped.size:
          self._retract(row, int(dropped[step]))
        start = step

  def cut(self, row: int, length: int) -> None:
    """Keeps the first `length` tokens of a row."""
    self._retract(row, len(self.tokens[row]) - length)

  def padded(self) -> dict[str, np.ndarray]:
    """The fields of `Rollouts` that are recorded step by step."""
    lengths = np.array([len(tokens) for tokens in self.tokens], np.int32)
    width = int(lengths.max(initial=0))
    def pad(rows, dtype):
      out = np.zeros((self.rows, width), dtype)
      for row, values in enumerate(rows):
        out[row, :len(values)] = values
      return out

    experts = {}
    if self.experts:
      fed = np.concatenate(self.experts, axis=1)
      out = np.zeros((self.rows, width, *fed.shape[2:]), fed.dtype)
      for row, steps in enumerate(self.steps):
        out[row, :len(steps)] = fed[row, steps]
      experts["experts"] = out
    return experts | {
        "tokens": pad(self.tokens, np.int32),
        "logprobs": pad(self.logprobs, np.float32),
        "provenance": pad(self.provenance, np.int8), "lengths": lengths,
        "raw": np.concatenate(self.raw, axis=1)}

  def _extend(self, record, row: int, steps: np.ndarray) -> None:
    self.tokens[row].extend(record["token"][row, steps].tolist())
    self.logprobs[row].extend(record["logprob"][row, steps].tolist())
    self.provenance[row].extend(record["provenance"][row, steps].tolist())

  def _retract(self, row: int, count: int) -> None:
    if count:
      for values in (
          self.tokens, self.logprobs, self.provenance, self.steps):
        del values[row][-count:]
