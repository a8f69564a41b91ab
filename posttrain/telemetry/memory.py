"""Memory estimate per device, from shapes alone, before compilation.

An estimate: XLA fuses and reuses buffers in ways that shapes do not tell.
Parameters, gradients, optimizer and cache are exact up to padding;
an update's total is within a third of the compiler's own figure for the
shapes in the tests. No JAX here, so that it runs before devices are touched.

  r: rows of a microbatch on one device  T: length  S: cache slots
"""

import dataclasses
import math
from collections.abc import Collection

from posttrain.model.config import ModelConfig

BYTES = {"float32": 4, "bfloat16": 2}
FLOAT32 = BYTES["float32"]
# A number and its part of the float32 scale of 64.
QUANTIZED_BYTES = {"int8": 1 + 1 / 16, "int4": 1 / 2 + 1 / 16,
                   "nf4": 1 / 2 + 1 / 16}
# Live at once in the head's backward pass: logits, softmax, their gradient.
LOGIT_BUFFERS = 3
# Of the layer whose backward pass is under way: its values, and gradients of
# about half of them.
LAYER_IN_PROGRESS = 1.5


def format_bytes(size: float) -> str:
  """`3 * 2**30` -> "3.0 GiB"."""
  for unit in ("B", "KiB", "MiB", "GiB"):
    if size < 1024:
      return f"{size:.0f} B" if unit == "B" else f"{size:.1f} {unit}"
    size /= 1024
  return f"{size:,.1f} TiB"


@dataclasses.dataclass(frozen=True)
class Estimate:
  """Bytes on one device, by part.

  Attributes:
    persistent: there all the time (parameters, optimizer, reference).
    training: on top of that during an update; empty without one.
    sampling: on top of it during generation; empty without one.
    scoring: on top of it while a reference that waits on the hosts is read.
    note: says what the estimate leaves out.
  """

  persistent: dict[str, int]
  training: dict[str, int]
  sampling: dict[str, int]
  scoring: dict[str, int] = dataclasses.field(default_factory=dict)
  note: str = ""

  @property
  def peak(self) -> int:
    return sum(self.persistent.values()) + max(
        sum(phase.values())
        for phase in (self.training, self.sampling, self.scoring))

  def line(self, available: int | None = None) -> str:
    """One line for a person.

    Args:
      available: bytes that the device has, where that is known.
    """
    def parts(sizes):
      return " + ".join(
          f"{name} {format_bytes(size)}" for name, size in sizes.items())

    text = f"memory per device, estimated: {format_bytes(self.peak)}"
    if available is not None:
      text += f" of {format_bytes(available)}"
    text += f" ({parts(self.persistent)}"
    if self.training:
      text += f"; an update adds {parts(self.training)}"
    if self.sampling:
      text += f"; sampling adds {parts(self.sampling)}"
    if self.scoring:
      text += f"; scoring adds {parts(self.scoring)}"
    return text + (f"; {self.note})" if self.note else ")")


def layer_parameters(config: ModelConfig, experts: int | None = None) -> int:
  """Of one layer; norms and biases, which no mesh splits, left out.

  Args:
    experts: so many of them; None: all.
  """
  experts = config.num_experts if experts is None else experts
  attention = config.embed * config.head_dim * 2 * (
      config.heads + config.kv_heads)
  return attention + config.embed * config.num_experts + (
      3 * config.embed * config.mlp * (experts or 1))


def parameters(config: ModelConfig) -> int:
  """All, the padding of the vocabulary included."""
  tables = 1 if config.tied_embeddings else 2
  padding = config.padded_vocab_size - config.vocab_size
  return config.num_parameters + tables * padding * config.embed


def cache_bytes(
    config: ModelConfig, *, rows: int, slots: int, parts: int = 1,
    tensor: int = 1, dtype: str = "compute",
) -> int:
  """Keys and values of `rows` rows (global) with `slots` slots, per device.

  Args:
    parts: that the mesh splits the rows in.
    dtype: "compute", or "int8" with a float32 scale for each vector.
  """
  heads = config.kv_heads // tensor
  vector = (config.head_dim + FLOAT32 if dtype == "int8"
            else config.head_dim * BYTES[config.dtype])
  return 2 * config.layers * math.ceil(rows / parts) * slots * heads * vector


def _layer_activations(
    config: ModelConfig, rows: int, length: int, tensor: int, expert: int,
) -> tuple[int, int, int]:
  """Bytes of one layer that a backward pass reads: input, products, rest."""
  size = BYTES[config.dtype]
  tokens = rows * length
  heads = (config.heads + 2 * config.kv_heads) * config.head_dim // tensor
  attended = config.heads * config.head_dim // tensor
  mlp, routed = _mlp_widths(config, expert)
  mlp //= tensor
  stream = tokens * config.embed * size
  # Outputs of the products with weights: q, k, v, o, gate, up, down.
  products = tokens * (heads + 2 * config.embed + 2 * mlp) * size
  # Norms in float32 and cast; heads before and after the rotation; the
  # activation and its product; scores, softmax and their cast.
  rest = (
      tokens * 2 * config.embed * (FLOAT32 + size)
      + tokens * (heads * FLOAT32 + attended * size + 2 * mlp * size + routed))
  if config.attention == "reference":
    scores = rows * (config.heads // tensor) * length * length
    rest += scores * (FLOAT32 + size)
  else:
    # What it gives is kept as the products are, and its normalisers.
    products += tokens * (
        attended * size + config.heads // tensor * FLOAT32)
  return stream, products, rest


def _mlp_widths(config: ModelConfig, expert: int) -> tuple[int, int]:
  """Per token of a device: width of the MLPs, and bytes of the routing.

  `expert` devices share their tokens. In the dense form each of them runs its
  experts on all of these; the grouped form has room for k rows of each.
  """
  if not config.num_experts:
    return config.mlp, 0
  # The router's logits, probabilities and their gradient.
  routed = 3 * FLOAT32 * config.num_experts
  if config.moe != "grouped":
    return config.mlp * config.num_experts, routed
  rows = expert * config.experts_per_token
  # Sorted on the way in, computed, and sorted back.
  return config.mlp * rows, routed + (
      3 * rows * config.embed * BYTES[config.dtype])


def activation_bytes(
    config: ModelConfig, *, rows: int, length: int, batch: int = 1,
    tensor: int = 1, expert: int = 1, context: int = 1,
) -> int:
  """Kept from the forward for the backward pass, and one layer's own peak.

  Args:
    rows, length: of one microbatch, global.
    batch: parts that the mesh splits the rows in, those of `expert` too.
    context: parts of the length; while that is whole, of the heads.
  """
  stream, products, rest = _layer_activations(
      config, math.ceil(rows / batch), length, tensor, expert)
  kept = {
      "full": stream, "dots": stream + products,
      "none": stream + products + rest}[config.remat]
  return (config.layers * kept + int(
      LAYER_IN_PROGRESS * (stream + products + rest))) // context


def _training(
    config, trained, rows, length, loss_chunk, *, parts, batch, tensor,
    expert, context):
  shards = parts * tensor
  size = BYTES[config.dtype]
  chunk = math.ceil(rows / batch) * min(loss_chunk, length // context)
  table = config.padded_vocab_size * config.embed // tensor
  # The experts stay apart.
  layer = layer_parameters(config, config.num_experts // expert) // tensor
  gathered = config.unroll * layer * size
  return {
      # Of the microbatch, and the sum over microbatches.
      "gradients": 2 * FLOAT32 * trained // shards,
      "activations": activation_bytes(
          config, rows=rows, length=length, batch=batch, tensor=tensor,
          expert=expert, context=context),
      "logits": (
          LOGIT_BUFFERS * FLOAT32 * chunk * config.padded_vocab_size // tensor),
      # The head is whole for all chunks, and so is its gradient.
      "gathered weights": gathered + 2 * table * FLOAT32 if parts > 1 else 0,
      # Three parts, which take the place of a gathered float32 head.
      "head in parts": 0 if config.dtype == "float32" else table * (
          3 * size - (FLOAT32 if parts > 1 else 0)),
  }


def decode_bytes(config: ModelConfig, weights_dtype: str) -> float:
  """Of a number; int8's scales, one for each output, are left out."""
  if weights_dtype == "int8":
    return 1
  merged = config.lora is not None and config.lora.decode == "merged"
  if config.quantized and not merged:
    return QUANTIZED_BYTES[config.quantized]
  return BYTES[config.dtype]


def estimate(
    config: ModelConfig, *, data: int = 1, fsdp: int = 1, expert: int = 1,
    context: int = 1, tensor: int = 1,
    rows: int = 0, sequence_length: int = 0, loss_chunk: int = 0,
    cache_rows: int = 0, cache_slots: int = 0, cache_dtype: str = "compute",
    weights_dtype: str = "compute",
    trained: int | None = None, optimizer_bytes: int | None = None,
    frozen_bytes: int = 0, reference_bytes: int = 0,
    offload: Collection[str] = (),
) -> Estimate:
  """Bytes per device for training, sampling, or both in turn.

  Args:
    config: with the vocabulary filled in.
    data, fsdp, expert, context, tensor: sizes of the mesh.
    rows, sequence_length: of one microbatch, global; rows=0: no training.
    loss_chunk: positions whose logits exist at once.
    cache_rows, cache_slots: rows decoded at once, global, and the longest
      cache; cache_rows=0: no sampling.
    cache_dtype, weights_dtype: of sampling: "compute" or "int8".
    trained: parameters that an update moves, over all devices; None: all.
    optimizer_bytes: of its state, over all devices; None: AdamW's moments in
      float32.
    frozen_bytes: of the other ones at rest, over all devices.
    reference_bytes: of a reference, what it does not share with the policy.
    offload: "optimizer" and "reference" are on the devices only while they
      are needed.
  """
  parts, batch = fsdp * expert * context, data * fsdp * expert
  shards = parts * tensor  # Of all parameters at rest.
  if trained is None:
    trained = parameters(config)
  persistent = {"parameters": (FLOAT32 * trained + frozen_bytes) // shards}
  if rows:
    if optimizer_bytes is None:
      optimizer_bytes = 2 * FLOAT32 * trained
    persistent["optimizer"] = optimizer_bytes // shards
  if reference_bytes:
    persistent["reference"] = reference_bytes // shards
  waiting = {name: persistent.pop(name) for name in offload
             if name in persistent}
  training: dict[str, int] = {}
  scoring: dict[str, int] = {}
  if rows:
    training = _training(
        config, trained, rows, sequence_length, loss_chunk, parts=parts,
        batch=batch, tensor=tensor, expert=expert, context=context)
  sampling: dict[str, int] = {}
  if cache_rows:
    local_rows = math.ceil(cache_rows / (batch * context))
    table = config.padded_vocab_size * config.embed // tensor
    whole = 0 if parts == 1 else table * (FLOAT32 + (
        0 if config.tied_embeddings else BYTES[config.dtype]))
    sampling = {
        "cache": cache_bytes(
            config, rows=cache_rows, slots=cache_slots, parts=batch * context,
            tensor=tensor, dtype=cache_dtype),
        # Decode holds every layer gathered over "fsdp", and cast unless it
        # is quantised; and the tables, if they rest split.
        "decode weights": whole + int(
            config.layers * decode_bytes(config, weights_dtype)
            * layer_parameters(
                config, config.num_experts // expert) / tensor),
        "logits": 2 * FLOAT32 * local_rows * config.padded_vocab_size,
    }
  if "reference" in waiting:
    scoring = {name: waiting.get(name, training.get(name, 0)) for name in (
        "reference", "logits", "gathered weights")}
  if "optimizer" in waiting:
    training["optimizer"] = waiting["optimizer"]
  return Estimate(persistent, training, sampling, scoring)
