"""Prefix caching: a radix tree of sequences whose KV cache is on the device.

Each entry is one sequence, in one row of some device arrays (a block). It
serves every prefix of its tokens, so a sequence that is looked up goes on from
the entry with which it has the most first tokens in common.

Memory is counted in slots of allocated arrays: a block counts whole until its
last entry goes. So blocks are evicted, not entries, the least recently used
first. Everything here is a function of what was asked for, in its order: under
several processes each of them keeps and evicts the same.

Differs from SGLang's RadixAttention (arXiv 2312.07104): nodes share no device
memory. An entry is contiguous and whole, and a prefix that two entries share is
stored twice.
"""

import dataclasses
import itertools
import operator
from collections.abc import Iterable, Sequence
from typing import Any

Tokens = tuple[int, ...]


@dataclasses.dataclass(eq=False)
class Block:
  """Device arrays of several rows.

  Attributes:
    rows: the device arrays.
    slots: cache slots of all rows together.
  """

  rows: Any
  slots: int


@dataclasses.dataclass(eq=False)
class Entry:
  """Cached sequence.

  Attributes:
    tokens: the sequence.
    block, row: where its keys and values are.
    hidden: the hidden state of its last token is there too, so that the next
      token can be drawn at once.
    used: time of its last use, of the cache's clock.
  """

  tokens: Tokens
  block: Block
  row: int
  hidden: bool
  used: int = 0


@dataclasses.dataclass(eq=False)
class _Node:
  """Node of the radix tree: the tokens that lead to it from its parent."""

  edge: Tokens
  children: dict[int, "_Node"] = dataclasses.field(default_factory=dict)
  entry: Entry | None = None


class PrefixCache:
  """Radix tree of cached sequences, with a budget of cache slots.

  Attributes:
    budget: slots that blocks may hold besides those that are needed now.
    evicted: tokens of sequences that left for the budget, so far.
    stale: tokens of sequences that `clear` dropped, so far.
  """

  def __init__(self, budget: int):
    self.budget = budget
    self.evicted = self.stale = 0
    self._root = _Node(())
    # The entries that are left in each. A block does not refer to them: arrays
    # in a cycle would stay on the device until Python looks for cycles.
    self._blocks: dict[Block, list[Entry]] = {}
    self._clock = itertools.count(1)

  @property
  def entries(self) -> list[Entry]:
    """All entries, block by block."""
    return list(itertools.chain(*self._blocks.values()))

  @property
  def slots(self) -> int:
    """Cache slots of all blocks."""
    return sum(block.slots for block in self._blocks)

  def find(self, tokens: Sequence[int]) -> tuple[Entry | None, int]:
    """Finds the entry that shares the most first tokens, and how many.

    Of several it takes the one that is no longer than that, if there is one.
    """
    path, same = self._walk(tuple(tokens))
    if not same:
      return None, 0
    node = path[-1]
    while node.entry is None:  # A leaf has one.
      node = next(iter(node.children.values()))
    return node.entry, same

  def use(self, entry: Entry) -> Entry:
    """Notes that an entry is used now; returns it."""
    entry.used = next(self._clock)
    return entry

  def add(
      self, rows: Any, slots: int,
      sequences: Iterable[tuple[int, Tokens, bool]],
  ) -> list[Entry]:
    """Adds the sequences in some rows of new arrays.

    A sequence that is cached already stays where it is, unless the new entry
    alone has a hidden state. Entries that are a beginning of a new sequence
    leave: the new one serves all that they served. Those with a hidden state
    stay, as another sample may begin with it, and are the first to be evicted.

    Args:
      rows: the device arrays.
      slots: cache slots of all their rows together.
      sequences: a row, its tokens, and `Entry.hidden`, in turn.

    Returns:
      The entries of the sequences, in their order.
    """
    block, found = Block(rows, slots), []
    for row, tokens, hidden in sequences:
      found.append(self.use(self._insert(Entry(tokens, block, row, hidden))))
    return found

  def trim(self, needed: Iterable[Entry] = (), room: int = 0) -> None:
    """Evicts blocks until the others, and `room` more slots, fit the budget.

    Args:
      needed: entries whose blocks stay, and are not counted.
      room: slots of a block that is about to be added.
    """
    kept = {entry.block for entry in needed}
    held = room + sum(
        block.slots for block in self._blocks if block not in kept)
    if held <= self.budget:
      return
    # One that is larger than the budget goes first, and not after all others.
    for block in sorted(self._blocks, key=lambda block: (
        block.slots <= self.budget,
        max(entry.used for entry in self._blocks[block]))):
      if held > self.budget and block not in kept:
        held -= block.slots
        for entry in list(self._blocks[block]):
          self.evicted += len(entry.tokens)
          self._remove(entry)

  def clear(self) -> None:
    """Drops everything, as after a change of weights."""
    self.stale += sum(len(entry.tokens) for entry in self.entries)
    self._root, self._blocks = _Node(()), {}

  def _walk(self, tokens: Tokens) -> tuple[list[_Node], int]:
    """Follows `tokens` from the root, as far as they go.

    Returns:
      The nodes on the way, the last of which may be reached in part only; and
      how many tokens were followed.
    """
    path, at = [self._root], 0
    while at < len(tokens) and tokens[at] in path[-1].children:
      path.append(path[-1].children[tokens[at]])
      same = _common(path[-1].edge, tokens, at)
      at += same
      if same < len(path[-1].edge):
        break
    return path, at

  def _insert(self, new: Entry) -> Entry:
    """Puts an entry into the tree; returns the one that is there then."""
    path, same = self._walk(new.tokens)
    covered = [node.entry for node in path if node.entry and
               len(node.entry.tokens) <= same and
               node.entry.tokens != new.tokens]
    for entry in covered:
      if entry.hidden:
        entry.used = 0
      else:
        self._remove(entry)
    if covered:
      path, same = self._walk(new.tokens)
    node = path[-1]
    extra = sum(len(each.edge) for each in path) - same
    if extra:  # The path ends within an edge, which is split there.
      node = _Node(node.edge[:-extra], {node.edge[-extra]: node})
      path[-2].children[node.edge[0]] = node
      path[-1].edge = path[-1].edge[-extra:]
    if same < len(new.tokens):
      leaf = _Node(new.tokens[same:])
      node.children[leaf.edge[0]] = leaf
      node = leaf
    old = node.entry
    if old and (old.hidden or not new.hidden):
      return old
    if old:
      self._leave(old)
    node.entry = new
    self._blocks.setdefault(new.block, []).append(new)
    return new

  def _leave(self, entry: Entry) -> None:
    """Takes an entry from its block, which goes with its last entry."""
    self._blocks[entry.block].remove(entry)
    if not self._blocks[entry.block]:
      del self._blocks[entry.block]

  def _remove(self, entry: Entry) -> None:
    """Takes an entry from the tree, with the nodes that lead to no other."""
    self._leave(entry)
    path, _ = self._walk(entry.tokens)
    path[-1].entry = None
    while len(path) > 1 and not path[-1].entry and not path[-1].children:
      del path[-2].children[path.pop().edge[0]]
    node = path[-1]
    if len(path) > 1 and not node.entry and len(node.children) == 1:
      [child] = node.children.values()
      child.edge = node.edge + child.edge
      path[-2].children[child.edge[0]] = child


def _common(edge: Tokens, tokens: Tokens, at: int) -> int:
  """Counts the first tokens of `edge` that `tokens` has from `at` on."""
  part = tokens[at:at + len(edge)]
  if part == edge:
    return len(edge)
  same = itertools.takewhile(bool, map(operator.eq, edge, part))
  return sum(1 for _ in same)
