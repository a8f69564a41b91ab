"""Active sequence: what the host keeps of a request while it decodes.

Its record of tokens, its search for stop strings, and the completion that it
becomes.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from posttrain.sampler import decode, requests, rollouts
from posttrain.sampler.budget_tables import BudgetTables
from posttrain.sampler.requests import Completion, Request

NOT_FINITE = (
    "The logits are not finite, so nothing can be drawn from them: the weights "
    "have diverged or were loaded wrongly, or a logits processor has divided "
    "by zero.")
Decode = Callable[[list[int]], str]


class Matcher:
  """Searches the text of one row for stop strings, as it grows.

  A string may begin and end inside tokens. What counts is the text: the row
  ends with the first token that completes one of its strings, and the chunk in
  which the host finds the string changes nothing.

  Each call of `find` is given all tokens so far, and decodes the new ones and
  a few before them only.
  """

  def __init__(self, strings: Sequence[str], decode: Decode):
    self._strings = tuple(strings)
    self._decode = decode
    self._searched = 0  # Tokens known not to complete a string.

  def find(self, tokens: list[int]) -> int:
    """Returns how many tokens the row keeps; -1 if no string is complete.

    Args:
      tokens: all tokens so far that cannot be retracted any more.
    """
    # The whole text is not decoded anew for every chunk, only its end.
    begin = self._begin(tokens)
    complete = lambda end: self._complete(self._decode(tokens[begin:end]))
    if not complete(len(tokens)):
      self._searched = len(tokens)
      return -1
    # The first token that completes a string, whatever the chunk brought.
    return next(end for end in range(self._searched + 1, len(tokens) + 1)
                if complete(end))

  def settled(self, tokens: list[int]) -> int:
    """Returns how many of the searched tokens no stop string can cut off.

    The others spell the beginning of a stop string.
    """
    begin = self._begin(tokens)
    text = self._decode(tokens[begin:])
    open_length = max(
        (n for s in self._strings for n in range(1, len(s))
         if text.endswith(s[:n])), default=0)
    end = len(tokens)
    while end > begin and open_length and (
        len(self._decode(tokens[begin:end])) > len(text) - open_length):
      end -= 1
    return end

  def _complete(self, text: str) -> bool:
    """True if the text has one of the strings in it."""
    return any(string in text for string in self._strings)

  def _begin(self, tokens: list[int]) -> int:
    """Returns a token before which no string that is not found yet begins."""
    # A decoder may treat the first token of a text in its own way, and a
    # character may need several tokens: hence more than the longest string.
    needed = max(map(len, self._strings)) + 4
    begin = self._searched
    while begin > 0:
      begin = max(begin - needed, 0)
      if len(self._decode(tokens[begin:self._searched])) >= 2 * needed:
        break
    return begin


class ActiveSequence:
  """Active sequence: one request that a row of the device batch decodes.

  Attributes:
    number: what `Engine.submit` returned for the request.
    request: the request.
    steps: decode steps that its row took, those of dropped tokens included.
  """

  def __init__(
      self, number: int, request: Request, tables: BudgetTables,
      text: Decode | None, recorded: decode.Recorded,
  ):
    self.number, self.request = number, request
    self.steps = 0
    self._recorded = recorded
    self._most = requests.most_slots(request, tables)
    # A delimiter that completes may retract this many earlier tokens, so the
    # last ones of the record are not final yet.
    self._held = tables.recalled
    self._row = rollouts.Row()
    self._raw: list[np.ndarray] = []
    self._surplus = 0
    self._matcher = None
    if request.stop_strings:
      assert text is not None
      self._matcher = Matcher(request.stop_strings, text)

  def needed(self, chunk: int) -> int:
    """Returns the cache slots that it may use by the end of the next chunk."""
    used = len(self.request.prompt) + self.steps
    return min(used + chunk, self._most)

  def script(self, chunk: int) -> np.ndarray:
    """Returns the choices to replay in the next chunk, [N] int32; -1 draws."""
    window = np.full(chunk, -1, np.int32)
    if self.request.script is not None:
      part = self.request.script[self.steps:self.steps + chunk]
      window[:len(part)] = part
    return window

  def add(
      self, record: Mapping[str, np.ndarray], row: int, steps: int,
      done: bool,
  ) -> bool:
    """Adds the sequence's steps of a chunk to its record.

    Args:
      record: of `decode.decode`, fetched: [B, N, ...] each.
      row: the sequence's row.
      steps: that the row took in this chunk.
      done: the row ended in it.

    Returns:
      True if a stop string ends it; the tokens behind it are then cut off.
    """
    self._row.add({name: x[row, :steps] for name, x in record.items()})
    self._raw.append(record["raw"][row, :steps])
    self.steps += steps
    if self._matcher is None:
      return False
    # A string that ends in tokens that may be retracted is not found yet.
    settled = len(self._row.tokens) - (0 if done else self._held)
    kept = self._matcher.find(self._row.tokens[:max(settled, 0)])
    if kept < 0:
      return False
    self._surplus = len(self._row.tokens) - kept
    self._row.cut(kept)
    return True

  @property
  def provenance(self) -> list[int]:
    """Provenance of all tokens so far, see `Completion`."""
    return self._row.columns["provenance"]

  def settled(self) -> list[int]:
    """Returns the tokens that nothing can retract or cut off any more."""
    tokens = self._row.tokens[:max(len(self._row.tokens) - self._held, 0)]
    if self._matcher is None:
      return tokens
    return tokens[:self._matcher.settled(tokens)]

  def completion(self, reason: str, state: Any, row: int) -> Completion:
    """Makes the completion of a finished sequence.

    Args:
      reason: why it ended; "" for the reason in `state`.
      state: the `BudgetState`, fetched, [B] arrays. The counts of a sequence
        that a stop string cut are those recorded at its last token.
      row: the sequence's row.
    """
    reason = reason or rollouts.FINISH_REASONS[int(state.finish_reason[row])]
    columns = {
        name: np.array(values) for name, values in self._row.columns.items()}
    counts = (
        state.thinking[row], state.answer[row], state.wait_count[row],
        state.think_end[row], state.steps[row])
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
    """Returns the fields that `Recorded` asks for, empty before any step."""
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
