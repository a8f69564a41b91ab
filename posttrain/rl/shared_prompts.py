"""Shared prompts: a group's completions after one copy of their prompt.

A group's completions have their prompt in common, and so its hidden states in
every layer. A piece of a row holds the prompt without its last token, and then
its members: each is that last token and a completion. A member sees the prompt
and itself, and no other member; its positions go on from the prompt's. Logprobs
and gradients are those of completions packed one by one: a prompt's gradient is
the sum over its members either way.

The last token of the prompt is there once for each member since it predicts
the first of the completion: so every token follows its predictor in the row.

With P tokens of prompt and C of each of G completions, P - 1 + G (C + 1)
tokens go through the layers in place of G (P + C).
"""

from collections.abc import Mapping, Sequence

import numpy as np

from posttrain.data import pack

Arrays = dict[str, np.ndarray]


def merge(
    examples: Sequence[Mapping[str, np.ndarray]],
    prompts: Sequence[Sequence[int]], *, length: int,
) -> list[Arrays]:
  """Merges examples of equal prompts into as few pieces as first-fit finds.

  Args:
    examples: columns [tokens, ...] of a prompt and a completion each; those of
      one prompt are alike on it.
    prompts: of each example; never empty.
    length: of a row; no piece is longer.

  Returns:
    Pieces with the examples' columns, and for each token its `member` (0 is
    the prompt) and its `place`, counted from the prompt's start.

  Raises:
    ValueError: an example is longer than a row.
  """
  groups: dict[tuple[int, ...], list[Mapping[str, np.ndarray]]] = {}
  for example, prompt in zip(examples, prompts, strict=True):
    groups.setdefault(tuple(prompt), []).append(example)
  pieces = []
  for prompt, members in groups.items():
    shared = len(prompt) - 1
    placement = pack.first_fit(
        [len(member["tokens"]) - shared for member in members],
        length=length - shared)
    for row in range(placement.row.max() + 1):
      pieces.append(_piece(
          [members[n] for n in np.flatnonzero(placement.row == row)], shared))
  return pieces


def _piece(members: Sequence[Mapping[str, np.ndarray]], shared: int) -> Arrays:
  sizes = [len(member["tokens"]) - shared for member in members]
  piece = {name: np.concatenate(
      [column[:shared], *(member[name][shared:] for member in members)])
           for name, column in members[0].items()}
  return piece | {
      "member": np.repeat(
          np.arange(len(members) + 1), [shared, *sizes]).astype(np.int32),
      "place": np.concatenate([np.arange(shared), *(
          shared + np.arange(size) for size in sizes)]).astype(np.int32)}


def separate(packed: Mapping[str, np.ndarray]) -> Arrays:
  """Gives each member of packed pieces a segment, and names its prompt's.

  Args:
    packed: [R, T, ...] columns of `merge`'s pieces, one segment for each.

  Returns:
    The same without `member` and `place`; with `positions` from the
    prompt's start, `segment_ids` of each member and, in `prefix_ids`, that of
    its prompt.
  """
  arrays = dict(packed)
  member, place = arrays.pop("member"), arrays.pop("place")
  prefix_ids = arrays["segment_ids"] * (1 + member.max())
  return arrays | {
      "positions": place, "prefix_ids": prefix_ids,
      "segment_ids": prefix_ids + member}
