"""Tables of budget forcing: the token ids that it matches, bans and forces.

  V: vocabulary    W: window of recent tokens    C: length of the tape
"""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np

from posttrain.text.thinking import ThinkingIds


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["newline_ends", "reflections", "step_ends"],
    meta_fields=["vocab_size", "start", "end", "delimiters", "newline",
                 "final_answer", "waits", "stop_ids", "step"])
@dataclasses.dataclass(frozen=True)
class BudgetTables:
  """Token ids of one tokenizer that budget forcing matches, bans and forces.

  The strings are static, the [V] arrays are not: other strings compile anew.

  Attributes:
    newline_ends: [V] bool, the token's text ends in a newline.
    vocab_size: V, without padding.
    start, end, newline, final_answer: ids of the strings.
    waits: ids of the wait texts, at least one text; it may be empty.
    delimiters: strings that end thinking when they are sampled; `end` is one.
    stop_ids: ids that end a row when they are sampled.
    reflections: [V] bool, tokens that a row with `Budgets.suppress` does not
      sample while it thinks; None for none.
    step: string that ends a step of thinking when it is sampled; () if steps
      are not counted.
    step_ends: [V] bool, tokens whose text has that string in it, which end a
      step too; None if steps are not counted.
  """

  newline_ends: np.ndarray | jax.Array
  vocab_size: int
  start: tuple[int, ...]
  end: tuple[int, ...]
  delimiters: tuple[tuple[int, ...], ...]
  newline: tuple[int, ...]
  final_answer: tuple[int, ...]
  waits: tuple[tuple[int, ...], ...]
  stop_ids: tuple[int, ...]
  reflections: np.ndarray | jax.Array | None = None
  step: tuple[int, ...] = ()
  step_ends: np.ndarray | jax.Array | None = None

  @classmethod
  def build(
      cls, thinking_ids: ThinkingIds, stop_ids: tuple[int, ...],
      newline_ends: np.ndarray, vocab_size: int,
      reflections: np.ndarray | None = None,
  ) -> "BudgetTables":
    """Collects and checks the tables of one tokenizer.

    Args:
      thinking_ids: the strings as ids; an empty `end` switches thinking off.
      stop_ids: ids that end a row.
      newline_ends: [V] bool, true where a token's text ends in a newline.
      vocab_size: V, without padding.
      reflections: [V] bool, tokens of reflection such as "wait" (NoWait,
        arXiv 2506.08343).

    Raises:
      ValueError: an id is outside the vocabulary, `newline_ends` has another
        length, or a delimiter cannot be sampled as a whole.
    """
    newline_ends = np.asarray(newline_ends, bool)
    if newline_ends.shape != (vocab_size,):
      raise ValueError(
          f"newline_ends has shape {newline_ends.shape}, and a vocabulary of "
          f"{vocab_size} needs ({vocab_size},).")
    # Without an `end` nothing is matched or forced, and all strings are empty,
    # so that the loop's program has no trace of them.
    used = bool(thinking_ids.end)
    string = lambda ids: tuple(int(i) for i in ids) if used else ()
    delimiters = tuple(dict.fromkeys(
        string(d) for d in (*thinking_ids.delimiters, thinking_ids.end) if d))
    step = string(thinking_ids.step)
    tables = cls(
        newline_ends, vocab_size, string(thinking_ids.start),
        string(thinking_ids.end), _reachable(delimiters) if used else (),
        string(thinking_ids.newline), string(thinking_ids.final_answer),
        tuple(map(string, (thinking_ids.wait, *thinking_ids.more_waits))),
        tuple(int(i) for i in stop_ids), reflections,
        step, np.isin(np.arange(vocab_size), thinking_ids.step_tokens)
        if step else None)
    tables._check()
    return tables

  def _check(self) -> None:
    """Raises ValueError for ids that do not exist or cannot be matched."""
    strings = {
        "thinking.start": self.start, "thinking.end": self.end,
        "thinking.newline": self.newline, "thinking.step": self.step,
        "thinking.final_answer": self.final_answer,
        "the tokenizer's stop ids": self.stop_ids}
    named = [("thinking.delimiters", ids) for ids in self.delimiters]
    named += [("thinking.wait_text", ids) for ids in self.waits]
    for name, ids in (*strings.items(), *named):
      if any(not 0 <= i < self.vocab_size for i in ids):
        raise ValueError(
            f"{name} has the ids {ids}, and the vocabulary ends at "
            f"{self.vocab_size - 1}. Use the tokenizer of this model.")
    for delimiter in self.delimiters:
      if set(delimiter[:-1]) & set(self.stop_ids):
        raise ValueError(
            f"The thinking delimiter {delimiter} has a stop id among "
            f"{self.stop_ids} before its last token, so a row would stop "
            "inside it. Add its beginning, up to that id, to "
            "thinking.delimiters.")

  @property
  def used(self) -> bool:
    """True if there is thinking at all: `end` is not empty."""
    return bool(self.end)

  @property
  def window(self) -> int:
    """W: length of the longest string to match, and one token before it."""
    strings = (*self.delimiters, self.start, self.step)
    return 1 + max(map(len, strings), default=0)

  @property
  def recalled(self) -> int:
    """Tokens that a match may retract besides the last one, at most."""
    return max(map(len, self.delimiters), default=1) - 1

  @property
  def tape(self) -> tuple[int, ...]:
    """[C] ids of all strings that can be forced, one after the other.

    -1 ends each string, and is at 0, where a row's cursor begins. In order:
    the wait texts; `end`; the closing of newline, `end` and final answer.
    """
    waits = (token for wait in self.waits for token in (*wait, -1))
    return (-1, *waits, *self.end, -1,
            *self.newline, *self.end, *self.final_answer, -1)

  def forced_at(self, cursor: jax.Array) -> jax.Array:
    """Returns `tape[cursor]`, [B] int32."""
    # As a contraction: the layout of a gather would be ambiguous.
    hit = cursor[:, None] == jnp.arange(len(self.tape))
    return jnp.sum(
        jnp.where(hit, jnp.asarray(self.tape, jnp.int32), 0), axis=1)

  @property
  def wait_cursors(self) -> tuple[int, ...]:
    """Index into the tape at which each wait text begins."""
    lengths = [len(wait) + 1 for wait in self.waits]
    return tuple(itertools.accumulate(lengths[:-1], initial=1))

  @property
  def end_cursor(self) -> int:
    """Index into the tape at which `end` begins."""
    return self.wait_cursors[-1] + len(self.waits[-1]) + 1

  @property
  def close_cursor(self) -> int:
    """Index into the tape at which the closing at a maximum begins."""
    return self.end_cursor + len(self.end) + 1


def _reachable(
    delimiters: tuple[tuple[int, ...], ...],
) -> tuple[tuple[int, ...], ...]:
  """Drops delimiters that begin with another, which always matches first."""
  return tuple(
      d for d in delimiters
      if not any(d != o and d[:len(o)] == o for o in delimiters))
