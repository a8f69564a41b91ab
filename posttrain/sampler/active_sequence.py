"""Active sequence: what the host keeps of a request while it decodes.

Its record of tokens, its search for stop strings, and the completion that it
becomes.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from posttrain.sampler import decode, requests, rollouts
from posttrain.sampler.budget_tables import BudgetTables
from posttrain.sampler.requests import Completion, Request
from posttrain.text import stop_strings, symbols, thinking

NOT_FINITE = (
    "The logits are not finite, so nothing can be drawn from them: the weights "
    "have diverged or were loaded wrongly, or a logits processor has divided "
    "by zero.")


class ActiveSequence:
  """Active sequence: one request that a row of the device batch decodes.

  Attributes:
    number: what `Engine.submit` returned for the request.
    request: the request.
    steps: decode steps that its row took, those of dropped tokens included.
    stop: where the stop string is that ended it, if one did.
  """

  def __init__(
      self, number: int, request: Request, tables: BudgetTables,
      table: symbols.SymbolTable | None, recorded: decode.Recorded,
  ):
    self.number, self.request = number, request
    self.steps = 0
    self.stop: stop_strings.Stop | None = None
    self._recorded = recorded
    self._most = requests.most_slots(request, tables)
    self._table, self._thinking_ids = table, tables.ids
    self._row = rollouts.Row()
    self._raw: list[np.ndarray] = []
    self._surplus = 0
    self._matcher = None
    if request.stop_strings:
      assert table is not None
      self._matcher = stop_strings.Matcher(
          [table.parse(s) for s in request.stop_strings], table.tokens)

  def needed(self, chunk: int) -> int:
    """Returns the cache slots that it may use by the end of the next chunk."""
    used = len(self.request.prompt) + self.steps
    # The others go on when it has ended, and must not overwrite what is kept.
    return used + chunk if self.request.keep else min(used + chunk, self._most)

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
    self._row.add({name: x[row, :steps] for name, x in record.items()} | {
        "step": np.arange(self.steps, self.steps + steps)})
    self._raw.append(record["raw"][row, :steps])
    self.steps += steps
    if self._matcher is None:
      return False
    # A string that ends in tokens that may be retracted is not found yet.
    tokens = self._row.tokens
    self.stop = self._matcher.find(tokens if done else self._final())
    if self.stop is None:
      return False
    self._surplus = len(self._row.tokens) - self.stop.end
    self._row.cut(self.stop.end)
    return True

  @property
  def draws(self) -> int:
    """Draws so far, those before the request included."""
    return self.request.first_draw + self.steps

  def kept(self) -> tuple[tuple[int, ...], int]:
    """Returns the sequence that can go on, and how much of it has a KV cache.

    It ends before the stop string, if one ended it and the request does not
    include it: from the token in which that begins only the text before it
    stays, spelt anew.

    Raises:
      ValueError: the vocabulary cannot spell that text.
    """
    tokens, prompt = self._row.tokens, self.request.prompt
    if self.stop is None or self.request.include_stop:
      return (*prompt, *tokens), len(prompt) + len(tokens) - 1
    assert self._table is not None
    begin = self.stop.begin
    before = self._table.tokens[tokens[begin]][:self.stop.head]
    head = self._table.spell(before)
    if before and not head:
      raise ValueError(
          f"It is not kept: a stop string begins within the token "
          f"{tokens[begin]}, and this vocabulary cannot spell the token's text "
          f"before that, {symbols.shown(before)}. Use another stop string.")
    return (*prompt, *tokens[:begin], *head), len(prompt) + begin

  def thinks(self, done: Completion) -> bool:
    """True if what can go on ends within a thinking section."""
    length, answer = len(done.tokens), done.answer_length
    is_open = done.think_end == "open"
    if self.stop is not None and not self.request.include_stop:
      length = self.stop.begin
      if length:
        _, answer, _, ended, _ = self._row.columns["counts"][length - 1]
        is_open = not ended
    if not length:
      return bool(self.request.in_thinking)
    # Tokens before a section are counted as an answer, until it begins.
    return is_open and not answer

  @property
  def provenance(self) -> list[int]:
    """Provenance of all tokens so far, see `Completion`."""
    return self._row.columns["provenance"]

  def settled(self) -> list[int]:
    """Returns the tokens that nothing can retract or cut off any more."""
    tokens = self._final()
    if self._matcher is None:
      return tokens
    return tokens[:self._matcher.settled(tokens)]

  def _final(self) -> list[int]:
    """Returns the tokens that no delimiter can retract any more."""
    tokens = self._row.tokens
    return tokens[:thinking.settled(tokens, self._thinking_ids)]

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
    think_length, answer, waits, think_end, steps = map(int, counts)
    return Completion(
        id=self.number, request=self.request, tokens=list(self._row.tokens),
        logprobs=columns["logprob"].astype(np.float32),
        provenance=columns["provenance"].astype(np.int8),
        finish_reason=reason, error=NOT_FINITE if reason == "error" else "",
        think_end=rollouts.THINK_ENDS[think_end], think_length=think_length,
        think_steps=steps, answer_length=answer, wait_count=waits,
        surplus=self._surplus, draws=self.request.first_draw + (
            int(columns["step"][-1]) + 1 if self._row.tokens else 0),
        experts=columns.get("experts"),
        entropy=_floats(columns, "entropy"),
        confidence=_floats(columns, "confidence"),
        raw=np.concatenate(self._raw) if self._raw else np.zeros(0, np.int32),
        **self._asked_for())

  def _asked_for(self) -> dict[str, Any]:
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


def _floats(
    columns: Mapping[str, np.ndarray], name: str) -> np.ndarray | None:
  """Returns a column that may not be recorded, as float32."""
  return columns[name].astype(np.float32) if name in columns else None
