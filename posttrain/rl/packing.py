"""Rollouts -> packed columns, and the arrays of an update.

A minibatch is a set of completions, each after its prompt, packed into rows and
cut into microbatches; or several share one prompt, see `shared_prompts`.
All minibatches of a batch of rollouts have one shape, and say how many of their
microbatches are in use, so that the learner is compiled once.

  U: minibatches  M: microbatches  R: rows of one  T: length of a row
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from posttrain import sharding
from posttrain.data import pack
from posttrain.rl import shared_prompts
from posttrain.sampler.rollouts import Rollouts

Arrays = dict[str, np.ndarray]

IDS = ("completion_ids", "group_ids")  # -1 where a token is of none.
ALWAYS = dict(
    tokens=np.int32, loss_mask=np.bool_, sampler_logprobs=np.float32,
    completion_ids=np.int32, group_ids=np.int32, positions=np.int32,
    segment_ids=np.int32)


@dataclasses.dataclass(frozen=True)
class Shapes:
  """Packing shapes of completions.

  Attributes:
    length: T, at least the longest prompt and completion together.
    rows: R, over all devices.
    num_minibatches: U.
    completions: per minibatch at most; its rows are never more.
    share_prompts: the completions of a prompt share one copy of it.
  """

  length: int
  rows: int
  num_minibatches: int
  completions: int
  share_prompts: bool = False

  @property
  def microbatches(self) -> int:
    """M, enough even if no two completions fit in one row."""
    return -(-self.completions // self.rows)


def pack_experience(
    rollouts: Rollouts, group_ids: np.ndarray,
    minibatches: Sequence[np.ndarray], shapes: Shapes,
) -> Arrays:
  """Packs completions with their prompts, as [U, M, R, T] arrays.

  Args:
    rollouts: B completions.
    group_ids: [B] int, equal for the completions of one prompt.
    minibatches: row indices of each; U of them, some may be empty.

  Returns:
    [U, M, R, T] arrays: those of `ALWAYS`, and `prefix_ids` if prompts are
    shared; `num_microbatches` [U] int32; and `sampler_experts`
    [U, M, R, T, L, k] if the rollouts have experts.
  """
  experts = rollouts.experts
  columns = _columns(shapes, None if experts is None else experts[0, :0])

  def examples(rows):
    if not rollouts.loss_mask[rows].any():  # No token is in the loss.
      return []
    alone = [_example(rollouts, row, group_ids[row]) for row in rows]
    return shared_prompts.merge(
        alone, [rollouts.prompts[row] for row in rows],
        length=shapes.length) if shapes.share_prompts else alone

  packed = [_pack(examples(rows), shapes, columns) for rows in minibatches]
  return {
      name: np.stack([arrays[name] for arrays in packed])
      for name in packed[0]}


def _example(rollouts: Rollouts, row: int, group: int) -> Arrays:
  """Lays one completion after its prompt."""
  prompt, length = rollouts.prompts[row], int(rollouts.lengths[row])
  behind = lambda values, dtype: np.concatenate([
      np.zeros((len(prompt), *values.shape[1:]), dtype),
      values[:length].astype(dtype)])
  experts = rollouts.experts
  every = lambda number: np.full(len(prompt) + length, number, np.int32)
  return {
      "completion_ids": every(row), "group_ids": every(group),
      "tokens": np.concatenate(
          [prompt, rollouts.tokens[row, :length]]).astype(np.int32),
      "loss_mask": behind(rollouts.loss_mask[row], bool),
      # A forced token's logprob may be unknown, and is never learned from.
      "sampler_logprobs": behind(np.where(
          rollouts.loss_mask[row], rollouts.logprobs[row], 0), np.float32),
      **({} if experts is None else {
          "sampler_experts": behind(experts[row], experts.dtype)})}


def per_token(
    experience: Arrays, rollouts: Rollouts, values: np.ndarray) -> np.ndarray:
  """Lays values [B, T] of completions' tokens where these are packed.

  Returns:
    [U, M, R, T] float32; 0 on prompts and padding.
  """
  ids = experience["completion_ids"]
  prompts = np.array([len(prompt) for prompt in rollouts.prompts])
  at = experience["positions"] - prompts[ids]
  inside = (ids >= 0) & (at >= 0)
  found = np.zeros(ids.shape, np.float32)
  found[inside] = values[ids[inside], at[inside]]
  return found


def denominator_shares(
    experience: Arrays, denominators: Sequence[float]) -> np.ndarray:
  """Shares each minibatch's denominator equally among its tokens in the loss.

  It may count completions that are not packed, since they cannot move the
  weights.
  """
  mask = experience["loss_mask"]
  share = np.array(denominators) / np.maximum(mask.sum((1, 2, 3)), 1)
  return mask * share.astype(np.float32)[:, None, None, None]


def empty_experience(
    shapes: Shapes, experts: np.ndarray | None = None) -> Arrays:
  """Packs one minibatch without a completion, [1, M, R, T]: for its shapes.

  Args:
    experts: [0, L, k] of a model that has them, see `Rollouts.experts`.
  """
  return {name: x[None] for name, x in _pack(
      [], shapes, _columns(shapes, experts)).items()}


def _columns(shapes: Shapes, experts: np.ndarray | None) -> Arrays:
  """Makes an array of no tokens for each column."""
  columns: Arrays = {
      name: np.zeros(0, dtype) for name, dtype in ALWAYS.items()}
  if shapes.share_prompts:
    columns["prefix_ids"] = np.zeros(0, np.int32)
  return columns if experts is None else columns | {"sampler_experts": experts}


def _pack(
    examples: Sequence[Arrays], shapes: Shapes, columns: Arrays) -> Arrays:
  """Packs one minibatch; `columns` has, of each, an array of no tokens."""
  rows = shapes.microbatches * shapes.rows
  arrays: Arrays = {
      name: np.zeros((rows, shapes.length, *like.shape[1:]), like.dtype)
      for name, like in columns.items()}
  used = 0
  if examples:
    packed, placement = pack.pack_rows(examples, length=shapes.length)
    if shapes.share_prompts:
      packed = shared_prompts.separate(packed)
    used = int(placement.row.max()) + 1
    for name, array in packed.items():
      arrays[name][:used] = array
  for name in IDS:
    arrays[name][arrays["segment_ids"] == 0] = -1
  if shapes.share_prompts:  # The shared prompt is of several completions.
    arrays["completion_ids"][arrays["segment_ids"] == arrays["prefix_ids"]] = -1
  folded = lambda x: x.reshape(
      shapes.microbatches, shapes.rows, *x.shape[1:])
  return {name: folded(x) for name, x in arrays.items()} | {
      "num_microbatches": np.array(-(-used // shapes.rows), np.int32)}


def minibatch(
    experience: Arrays, index: int,
    put: Callable[..., Any] = sharding.put,
) -> tuple[dict[str, Any], int]:
  """Puts one minibatch on the mesh; returns its microbatches in use too.

  Args:
    put: what makes device arrays; `sharding.abstract` for their shapes.
  """
  arrays = {
      name: array[index] for name, array in experience.items()
      if array.ndim > 1}
  return {
      name: put(array, None, "batch", "length", *(None,) * (array.ndim - 3))
      for name, array in arrays.items()}, int(
          experience["num_microbatches"][index])
