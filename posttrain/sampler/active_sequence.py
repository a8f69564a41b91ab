"""One slot's request while it runs: its record, its stop strings, its end."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from posttrain.sampler import decode, requests, rollouts
from posttrain.sampler.budget_tables import BudgetTables
from posttrain.sampler.requests import Completion, Request
from posttrain.sampler.stop_strings import Decode, Matcher

NOT_FINITE = (
    "The logits are not finite, so nothing can be drawn from them: the weights "
    "have diverged or were loaded wrongly, or a hook has divided by zero.")


class Live:
  """Active sequence, as the host knows it.

  Attributes:
    number, request: of the engine's queue.
    steps: that the row took.
  """

  def __init__(
      self, number: int, request: Request, tables: BudgetTables,
      text: Decode | None, recorded: decode.Recorded,
  ):
    self.number, self.request = number, request
    self.steps = 0
    self._recorded = recorded
    self._most = requests.most_slots(request, tables)
    # Earlier tokens of a delimiter may still be taken back.
    self._held = tables.recalled
    self._row = rollouts.Row()
    self._raw: list[np.ndarray] = []
    self._surplus = 0
    self._matcher = None
    if request.stop_strings:
      assert text is not None
      self._matcher = Matcher(request.stop_strings, text)

  def needed(self, chunk: int) -> int:
    """Slots that the row may use by the end of the next chunk."""
    used = len(self.request.prompt) + self.steps
    return min(used + chunk, self._most)

  def script(self, chunk: int) -> np.ndarray:
    """[N] int32, the choices to replay next; -1 draws."""
    window = np.full(chunk, -1, np.int32)
    if self.request.script is not None:
      part = self.request.script[self.steps:self.steps + chunk]
      window[:len(part)] = part
    return window

  def add(
      self, record: Mapping[str, np.ndarray], slot: int, steps: int,
      done: bool,
  ) -> bool:
    """Takes the row's steps of a chunk; whether a stop string ends it."""
    self._row.add({name: x[slot, :steps] for name, x in record.items()})
    self._raw.append(record["raw"][slot, :steps])
    self.steps += steps
    if self._matcher is None:
      return False
    settled = len(self._row.tokens) - (0 if done else self._held)
    kept = self._matcher.find(self._row.tokens[:max(settled, 0)])
    if kept < 0:
      return False
    self._surplus = len(self._row.tokens) - kept
    self._row.cut(kept)
    return True

  def settled(self) -> list[int]:
    """The tokens that nothing can take back or cut off any more."""
    tokens = self._row.tokens[:max(len(self._row.tokens) - self._held, 0)]
    if self._matcher is None:
      return tokens
    return tokens[:self._matcher.settled(tokens)]

  def completion(self, reason: str, state: Any, slot: int) -> Completion:
    """The finished row.

    Args:
      reason: of its end; "" for the one in `state`.
      state: fetched, [B] arrays; counts of a row that a stop string cut are
        its last token's.
    """
    reason = reason or rollouts.FINISH_REASONS[int(state.finish_reason[slot])]
    columns = {
        name: np.array(values) for name, values in self._row.columns.items()}
    counts = (
        state.thinking[slot], state.answer[slot], state.wait_count[slot],
        state.think_end[slot], state.steps[slot])
    if reason == "stop":
      counts = columns["counts"][-1]
    thinking, answer, waits, think_end, steps = map(int, counts)
    return Completion(
        id=self.number, request=self.request, tokens=list(self._row.tokens),
        logprobs=columns["logprob"].astype(np.float32),
        provenance=columns["provenance"].astype(np.int8),
        finish_reason=reason, error=NOT_FINITE if reason == "error" else "",
        think_end=rollouts.THINK_ENDS[think_end], think_length=thinking,
        think_steps=steps, answer_length=answer, wait_count=waits,
        surplus=self._surplus, experts=columns.get("experts"),
        raw=np.concatenate(self._raw) if self._raw else np.zeros(0, np.int32),
        **self._asked_for())

  def _asked_for(self) -> dict[str, np.ndarray]:
    """What is recorded beside tokens; a row that never stepped has it empty."""
    def column(name: str, dtype: Any, *last: int) -> np.ndarray:
      values = self._row.columns.get(name, [])
      return np.array(values, dtype).reshape(len(values), *last)

    found, count = {}, self._recorded.top_logprobs
    if self._recorded.model_logprobs:
      found["model_logprobs"] = column("model_logprob", np.float32)
    if count:
      found |= {"top_tokens": column("top_tokens", np.int32, count),
                "top_logprobs": column("top_logprobs", np.float32, count)}
    return found
