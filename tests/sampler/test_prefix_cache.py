"""Oracle: a plain list of sequences, over thousands of random operations."""

import numpy as np
import pytest

from posttrain.sampler.prefix_cache import PrefixCache


def common(a, b) -> int:
  n = 0
  while n < min(len(a), len(b)) and a[n] == b[n]:
    n += 1
  return n


class Naive:
  """A list of blocks, each a list of [tokens, hidden, time of its last use]."""

  def __init__(self, budget: int):
    self.budget, self.blocks, self.time = budget, [], 0
    self.evicted = self.stale = 0

  def entries(self):
    return [entry for _, _, block in self.blocks for entry in block]

  def longest(self, tokens) -> int:
    return max((common(entry[0], tokens) for entry in self.entries()),
               default=0)

  def use(self, tokens):
    self.time += 1
    for entry in self.entries():
      if entry[0] == tokens:
        entry[2] = self.time

  def add(self, rows, slots, sequences):
    block = []
    self.blocks.append((rows, slots, block))
    for _, tokens, hidden in sequences:
      for _, _, other in self.blocks:
        covered = [entry for entry in other if len(entry[0]) < len(tokens)
                   and tokens[:len(entry[0])] == entry[0]]
        for entry in covered:
          entry[2] = 0
        other[:] = [entry for entry in other
                    if entry[1] or entry not in covered]
      same = [entry for entry in self.entries() if entry[0] == tokens]
      if not same or (hidden and not same[0][1]):
        for _, _, other in self.blocks:
          other[:] = [entry for entry in other if entry[0] != tokens]
        block.append([tokens, hidden, 0])
      self.use(tokens)
    self.blocks = [block for block in self.blocks if block[2]]

  def trim(self, needed, room):
    kept = [block for block in self.blocks
            if any(entry[0] in needed for entry in block[2])]
    while True:
      others = [block for block in self.blocks if block not in kept]
      if room + sum(slots for _, slots, _ in others) <= self.budget or (
          not others):
        return
      oldest = min(others, key=lambda block: (
          block[1] <= self.budget, max(entry[2] for entry in block[2])))
      self.evicted += sum(len(entry[0]) for entry in oldest[2])
      self.blocks.remove(oldest)


def check(cache, naive):
  found = {entry.tokens: (entry.hidden, entry.used, entry.block.rows)
           for entry in cache.entries}
  assert len(found) == len(cache.entries)
  assert found == {
      tokens: (hidden, used, rows) for rows, _, block in naive.blocks
      for tokens, hidden, used in block}
  assert cache.slots == sum(slots for _, slots, _ in naive.blocks)
  assert (cache.evicted, cache.stale) == (naive.evicted, naive.stale)


@pytest.mark.parametrize("seed", range(6))
def test_it_is_a_list_of_sequences(seed):
  rng = np.random.default_rng(seed)
  budget = int(rng.integers(0, 120))
  cache, naive = PrefixCache(budget), Naive(budget)
  # Few letters and short sequences: they share much, and come again.
  draw = lambda: tuple(rng.integers(
      0, 2 + seed % 3, rng.integers(1, 12)).tolist())
  hits = 0
  for number in range(3000):
    roll = rng.random()
    if roll < 0.3:
      new = [(row, draw(), bool(rng.random() < 0.7))
             for row in range(rng.integers(1, 4))]
      slots = int(rng.integers(1, 30))
      entries = cache.add(number, slots, new)
      naive.add(number, slots, new)
      assert [entry.tokens for entry in entries] == [each[1] for each in new]
    elif roll < 0.5:
      needed = [entry for entry in cache.entries if rng.random() < 0.1]
      room = int(rng.integers(0, 40))
      naive.trim([entry.tokens for entry in needed], room)
      cache.trim(needed, room)
    elif roll < 0.502:
      naive.stale += sum(len(entry[0]) for entry in naive.entries())
      naive.blocks = []
      cache.clear()
    else:
      tokens = draw()
      entry, same = cache.find(tokens)
      assert same == naive.longest(tokens)
      assert (entry is None) == (same == 0)
      if entry:
        assert common(entry.tokens, tokens) == same
        exact = [each for each in naive.entries() if each[0] == tokens[:same]]
        assert len(entry.tokens) == same or not exact
        cache.use(entry)
        naive.use(entry.tokens)
        hits += len(entry.tokens) == same
    check(cache, naive)
  assert hits > 100 or budget < 10
  assert cache.evicted > 0 and cache.stale >= 0


def test_the_tree_is_compressed():
  """Nodes without an entry branch, and leaves have one: so it stays small."""
  rng = np.random.default_rng(0)
  cache = PrefixCache(40)
  for number in range(400):
    cache.add(number, 1, [(0, tuple(rng.integers(0, 3, 8).tolist()), True)])
    cache.trim()
    nodes = [cache._root]
    for node in nodes:
      nodes += node.children.values()
      assert all(first == child.edge[0]
                 for first, child in node.children.items())
      assert node is cache._root or node.entry or len(node.children) > 1
    assert len(nodes) <= 1 + 2 * len(cache.entries)
  assert len(cache.entries) == 40
