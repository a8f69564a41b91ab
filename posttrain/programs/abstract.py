"""Weights and optimizer states as shapes on the current mesh."""

import math
from collections.abc import Collection
from typing import Any

import jax

from posttrain import weights
from posttrain.model import transformer
from posttrain.model.block import Block
from posttrain.model.config import ModelConfig
from posttrain.model.transformer import Transformer
from posttrain.sampler import decode
from posttrain.train import spikes, trainable
from posttrain.train import state as state_lib


def shard_bytes(tree: Any) -> int:
  """Bytes of one device's part of abstract or real arrays."""
  return sum(
      math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
      for x in jax.tree.leaves(tree))


def model_of(config: ModelConfig) -> Transformer:
  """Parameters in float32, as the current mesh would hold them."""
  return weights.on_mesh(transformer.abstract(config))


def trained(
    config: ModelConfig, plan: trainable.Plan,
) -> tuple[Transformer, frozenset[str]]:
  """The model as a stage trains it, and the paths of what it trains."""
  whole, paths = trainable.abstract(config, plan)
  return weights.on_mesh(whole), paths


def state_of(
    model: Transformer, paths: Collection[str], optimizer: Any,
    rule: spikes.Rule | None,
) -> state_lib.TrainState:
  """The training state of an update, as the current mesh would hold it."""
  return weights.on_mesh(jax.eval_shape(
      lambda model: state_lib.create(model, optimizer, paths, rule), model))


def unstacked(
    model: Transformer, weights_dtype: str,
) -> tuple[Transformer, list[Block], dict[str, Any]]:
  """The weights as the decode loop reads them, see `decode.unstacked`.

  Returns:
    The model, its layers, and by name the arrays of the model at rest that
    stay on the devices as well, because the decode loop has another copy.
  """
  whole, blocks = weights.on_mesh(decode.unstacked.eval_shape(
      model, weights_dtype=weights_dtype))
  kept = [w for w, ready in zip(
      jax.tree.leaves(model), jax.tree.leaves(whole), strict=True)
          if (w.sharding, w.dtype) != (ready.sharding, ready.dtype)]
  return whole, blocks, {"tables at rest": kept} if kept else {}
