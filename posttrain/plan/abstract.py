"""What a config puts on devices, as shapes on the current mesh."""

import math
from collections.abc import Collection
from typing import Any

import jax
from ml_collections import config_dict

from posttrain import weights
from posttrain.model import transformer
from posttrain.model.block import Block
from posttrain.model.transformer import Transformer
from posttrain.plan.setup import Setup
from posttrain.sampler import decode
from posttrain.stages import training
from posttrain.train import state as state_lib
from posttrain.train import trainable


def shard_bytes(tree: Any) -> int:
  """Bytes of one device's part of abstract or real arrays."""
  return sum(
      math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
      for x in jax.tree.leaves(tree))


def model_of(setup: Setup) -> Transformer:
  """Parameters in float32, as the current mesh would hold them."""
  return weights.on_mesh(transformer.abstract(setup.model))


def trained(
    setup: Setup, stage: str) -> tuple[Transformer, frozenset[str]]:
  """The model as a stage trains it, and the paths of what it trains."""
  whole, paths = trainable.abstract(
      setup.model, training.plan(setup.config[stage], setup.config.compute))
  return weights.on_mesh(whole), paths


def state_of(
    model: Transformer, optimizer: Any, paths: Collection[str],
    section: config_dict.ConfigDict,
) -> state_lib.TrainState:
  """What an update moves, as the current mesh would hold it."""
  return weights.on_mesh(jax.eval_shape(
      lambda model: state_lib.create(
          model, optimizer, paths, training.spike_rule(section)), model))


def unstacked(
    model: Transformer, weights_dtype: str,
) -> tuple[Transformer, list[Block], dict[str, Any]]:
  """The weights as the decode loop reads them, see `decode.unstacked`.

  Returns:
    The model, its layers, and by a name what of the model at rest is on the
    devices besides, as it was not whole.
  """
  whole, blocks = weights.on_mesh(decode.unstacked.eval_shape(
      model, weights_dtype=weights_dtype))
  kept = [w for w, ready in zip(
      jax.tree.leaves(model), jax.tree.leaves(whole), strict=True)
          if (w.sharding, w.dtype) != (ready.sharding, ready.dtype)]
  return whole, blocks, {"tables at rest": kept} if kept else {}
