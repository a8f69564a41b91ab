"""Tables of budget forcing: strings that it matches, bans and forces.

All of it is arrays, which are put on the device once: other strings of the same
shapes compile nothing. What only the host reads is no part of the pytree.

  V: vocabulary  S: states  E: events  N: heads  C: length of the tape
  W: window of recent tokens
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import numpy as np

from posttrain import sharding
from posttrain.text import delimiters
from posttrain.text.delimiters import Strings
from posttrain.text.symbols import CONTROL, Symbols
from posttrain.text.thinking import ThinkingIds

NOTHING = ThinkingIds()
Array = Any  # NumPy until `put`, then on the devices.


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Matcher:
  """Automaton of the delimiters, see `delimiters.Automaton`.

  Attributes:
    next, event: [S, V] int8 or int16, the state behind each token, and what
      the token completes: a row of `effects`.
    effects: [E, 6] int32: the token completes `start`; its symbols behind that;
      it completes a delimiter; symbols from that one's begin to the token's
      end; it may stay; steps that end.
    symbols: [V] int32, symbols of each token.
    begun: [S] int32, symbols of `end` that the text ends in.
    think: int32, the state in which thinking begins.
    opening: [V] bool, tokens that are wholly a beginning of a delimiter.
    depth: [S, V] int8 or int16, of a token that completes a delimiter the
      delimiter's symbols before the token; -1 where it completes none.
    newline_ends: [V] bool, the token's text ends in a newline.
  """

  next: Array
  event: Array
  effects: Array
  symbols: Array
  begun: Array
  think: Array
  opening: Array
  depth: Array
  newline_ends: Array

  @classmethod
  def of(
      cls, automaton: delimiters.Automaton, newline_ends: np.ndarray,
  ) -> "Matcher":
    completes = automaton.delimiter >= 0
    effects = np.stack([
        automaton.started, automaton.behind, completes, automaton.back,
        automaton.kept, automaton.steps], axis=1).astype(np.int32)
    event = automaton.event
    depth = np.where(
        completes[event],
        np.maximum(automaton.back[event] - automaton.symbols, 0), -1)
    return cls(
        automaton.next, event, effects, automaton.symbols, automaton.begun,
        np.int32(automaton.think), automaton.opening,
        depth.astype(np.int8 if depth.max() < 127 else np.int16), newline_ends)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Tape:
  """Tape of all strings that can be forced, one after the other.

  Attributes:
    tokens: [C] int32; -1 ends each string, and is at 0, where a row's cursor
      begins. The heads come first.
    heads: [3, N] int32: a token, how many of its first symbols stand before a
      delimiter, and where they are spelt on the tape.
    heads_end: int32, index behind the last head. There all of them come again,
      for a head that has no text of thinking, but the end of `start` alone.
    waits: int32, index of each wait text.
    rests: int32, index of the rest of `end` from each of its symbols on; the
      last, behind the whole, is 0.
    close: int32, index of the closing at a maximum: newline and `end`.
    final: int32, index of the final answer.
  """

  tokens: Array
  heads: Array
  heads_end: Array
  waits: Array
  rests: Array
  close: Array
  final: Array

  @classmethod
  def of(cls, automaton: delimiters.Automaton, ids: ThinkingIds) -> "Tape":
    tokens = [-1]

    def write(*strings: Sequence[int]) -> np.ndarray:
      """Appends strings, and returns the index of each."""
      lengths = [len(string) + 1 for string in strings]
      begins = itertools.accumulate(lengths[:-1], initial=len(tokens))
      found = np.array([*begins][:len(strings)], np.int32)
      for string in strings:
        tokens.extend((*string, -1))
      return found

    heads = np.stack([
        automaton.head_token, automaton.head_symbols,
        write(*automaton.heads)])
    heads_end = np.int32(len(tokens))
    write(*automaton.heads)
    waits = write(ids.wait, *ids.more_waits)
    whole, *rests = automaton.rest
    close, *others, final = write(
        (*ids.newline, *whole), *rests, ids.final_answer)
    return cls(
        np.array(tokens, np.int32), heads.astype(np.int32), heads_end, waits,
        np.array([close + len(ids.newline), *others, 0], np.int32), close,
        final)


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["matcher", "tape", "reflections"],
    meta_fields=["vocab_size", "stop_ids", "window"],
    drop_fields=["ids", "retracted"])
@dataclasses.dataclass(frozen=True)
class BudgetTables:
  """Tables of one tokenizer that budget forcing matches, bans and forces by.

  Attributes:
    vocab_size: V, without padding.
    stop_ids: ids that end a row when they are sampled.
    window: W, tokens of a row that are remembered: those that a delimiter may
      be spelt in, and one before them.
    matcher, tape: None without thinking, so that the loop's program has no
      trace of them.
    reflections: [V] bool, tokens that a row with `Budgets.suppress` does not
      sample while it thinks; None for none.
    ids: the strings as token ids, for the host; empty without thinking.
    retracted: the most tokens that a wait retracts, and that the end of the
      thinking does; for the host.
  """

  vocab_size: int
  stop_ids: tuple[int, ...]
  window: int = 1
  matcher: Matcher | None = None
  tape: Tape | None = None
  reflections: Array | None = None
  ids: ThinkingIds = NOTHING
  retracted: tuple[int, int] = (0, 0)

  @classmethod
  def build(
      cls, ids: ThinkingIds, spell: Callable[[Symbols], tuple[int, ...]],
      stop_ids: Iterable[int], newline_ends: np.ndarray,
      reflections: np.ndarray | None = None,
  ) -> "BudgetTables":
    """Collects and checks the tables of one tokenizer.

    Args:
      ids: the strings to match and to force; an empty `end` switches thinking
        off.
      spell: spells symbols as token ids, alone.
      stop_ids: ids that end a row.
      newline_ends: [V] bool, true where a token's text ends in a newline.
      reflections: [V] bool, tokens of reflection such as "wait" (NoWait,
        arXiv 2506.08343).

    Raises:
      ValueError: an id is outside the vocabulary, the lengths of `ids.tokens`
        and `newline_ends` differ, a delimiter cannot be sampled as a whole, or
        the text before it in a token cannot be spelt.
    """
    newline_ends = np.asarray(newline_ends, bool)
    size, stop_ids = newline_ends.size, tuple(int(i) for i in stop_ids)
    _check(ids, stop_ids, size)
    if not ids.end:
      return cls(size, stop_ids, reflections=reflections)
    automaton = delimiters.build(ids.strings, ids.tokens, spell)
    longest = np.array([*automaton.longest, 0])
    # A delimiter that is always kept is retracted for a wait only.
    replaced = automaton.delimiter[~automaton.kept]
    return cls(
        size, stop_ids, 1 + max(1, longest.max()),
        Matcher.of(automaton, newline_ends), Tape.of(automaton, ids),
        reflections, ids,
        (int(longest.max()), int(longest[replaced].max(initial=0))))

  @classmethod
  def of_ids(
      cls, ids: ThinkingIds, stop_ids: Iterable[int], newline_ends: np.ndarray,
      reflections: np.ndarray | None = None, *,
      delimiters: Iterable[Sequence[int]] = (), step: Sequence[int] = (),
  ) -> "BudgetTables":
    """Builds tables of a vocabulary in which no tokens merge.

    Args:
      ids: the strings as token ids; what else it has is not looked at.
      stop_ids, newline_ends, reflections: see `build`.
      delimiters, step: token ids of strings that are matched only.
    """
    symbols = lambda string: tuple(CONTROL + int(i) for i in string)
    if ids.end:
      ids = dataclasses.replace(
          ids, tokens=[(CONTROL + i,) for i in range(newline_ends.size)],
          strings=Strings(symbols(ids.start), symbols(ids.end), tuple(
              dict.fromkeys(map(symbols, filter(
                  None, (ids.end, *delimiters))))), symbols(step)))
    return cls.build(
        ids, lambda string: tuple(s - CONTROL for s in string), stop_ids,
        newline_ends, reflections)

  def put(
      self, put: Callable[..., Any] = sharding.put) -> "BudgetTables":
    """Puts the arrays on the devices of the current mesh, whole on each.

    `put` may be `sharding.abstract`, which gives shapes for a plan.
    """
    placed = jax.tree.map(
        lambda x: put(np.asarray(x), *(None for _ in np.shape(x))), self)
    return dataclasses.replace(
        placed, ids=self.ids, retracted=self.retracted)

  @property
  def used(self) -> bool:
    """True if there is thinking at all: `end` is not empty."""
    return self.matcher is not None

  @property
  def wait_texts(self) -> int:
    """Wait texts, of which a row's `wait_order` has indices."""
    return 1 + len(self.ids.more_waits)

  @property
  def held(self) -> int:
    """Tokens that a delimiter may retract besides the last one, at most."""
    return max(self.window - 2, 0)


def _check(ids: ThinkingIds, stop_ids: tuple[int, ...], size: int) -> None:
  """Raises ValueError for ids that do not exist or cannot be matched."""
  if ids.end and len(ids.tokens) != size:
    raise ValueError(
        f"newline_ends has {size} tokens, and the vocabulary of the thinking "
        f"strings {len(ids.tokens)}. Make both of one tokenizer.")
  named = [(f"thinking.{name}", getattr(ids, name)) for name in (
      "start", "end", "newline", "final_answer")]
  named += [("thinking.wait_text", w) for w in (ids.wait, *ids.more_waits)]
  for name, found in (*named, ("the tokenizer's stop ids", stop_ids)):
    if any(not 0 <= i < size for i in found):
      raise ValueError(
          f"{name} has the ids {tuple(found)}, and the vocabulary ends at "
          f"{size - 1}. Use the tokenizer of this model.")
  known = ids.strings.delimiters
  for delimiter in known:
    inside = {CONTROL + i for i in stop_ids}.intersection(delimiter[:-1])
    # One that begins with another delimiter is never found whole.
    if inside and not any(
        d != delimiter and d == delimiter[:len(d)] for d in known):
      raise ValueError(
          f"A thinking delimiter has the stop id {min(inside) - CONTROL} "
          "before its end, so a row would stop inside it. Add its beginning, "
          "up to that id, to thinking.delimiters.")
