"""Memory estimate per device, from shapes alone, before compilation.

XLA fuses and reuses buffers in ways that shapes do not tell. Parameters,
gradients, optimizer and KV cache are exact up to padding; an update's total is
within a third of the compiler's own figure for the shapes in the tests. This
module has no JAX, so that it runs before devices are touched.

  r: rows of a microbatch on one device  T: length  S: cache slots
"""

import dataclasses
import math
from collections.abc import Collection

from posttrain.model.config import ModelConfig

BYTES = {"float32": 4, "bfloat16": 2}
FLOAT32 = BYTES["float32"]
# One number and a 64th of the float32 scale that a block of 64 shares.
QUANTIZED_BYTES = {"int8": 1 + 1 / 16, "int4": 1 / 2 + 1 / 16,
                   "nf4": 1 / 2 + 1 / 16}
# Alive at once in the head's backward pass: logits, softmax, their gradient.
LOGIT_BUFFERS = 3
# The layer whose backward pass is running has its recomputed values, and
# gradients of about half of them.
LAYER_IN_PROGRESS = 1.5


def format_bytes(size: float) -> str:
  """Formats a size with its unit: `3 * 2**30` -> "3.0 GiB"."""
  for unit in ("B", "KiB", "MiB", "GiB"):
    if size < 1024:
      return f"{size:.0f} B" if unit == "B" else f"{size:.1f} {unit}"
    size /= 1024
  return f"{size:,.1f} TiB"


@dataclasses.dataclass(frozen=True)
class Estimate:
  """Bytes on one device, by part.

  Attributes:
    persistent: at all times (parameters, optimizer, reference).
    training: in addition during an update; empty without training.
    sampling: in addition during generation; empty without sampling.
    scoring: in addition while an offloaded reference is used.
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
    """Describes the estimate in one line.

    Args:
      available: the device's memory in bytes, if it is known.
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


def parameters(config: ModelConfig) -> int:
  """Counts all parameters, the padding of the vocabulary included."""
  tables = 1 if config.tied_embeddings else 2
  padding = config.padded_vocab_size - config.vocab_size
  return config.num_parameters + tables * padding * config.embed


def cache_bytes(
    config: ModelConfig, *, rows: int, slots: int, parts: int = 1,
    tensor: int = 1, dtype: str = "compute",
) -> int:
  """Bytes of the KV cache on one device.

  Args:
    rows: rows (sequences) decoded at once, over all devices.
    slots: cache slots of a row.
    parts: number of parts into which the mesh splits the rows.
    tensor: number of parts into which it splits the kv heads.
    dtype: "compute", or "int8" with a float32 scale for each vector.
  """
  heads = config.kv_heads // tensor
  vector = (config.head_dim + FLOAT32 if dtype == "int8"
            else config.head_dim * BYTES[config.dtype])
  return 2 * config.layers * math.ceil(rows / parts) * slots * heads * vector


def _layer_activations(
    config: ModelConfig, rows: int, length: int, tensor: int, expert: int,
) -> tuple[int, int, int]:
  """Bytes of one layer that a backward pass reads: input, products, rest.

  The three parts are those between which `compute.remat` chooses.
  """
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
    # Blockwise attention never has the scores. Its output and the softmax's
    # normalisers are kept like products, for its own backward pass.
    products += tokens * (
        attended * size + config.heads // tensor * FLOAT32)
  return stream, products, rest


def _mlp_widths(config: ModelConfig, expert: int) -> tuple[int, int]:
  """Width of a token's MLPs on a device, and bytes of its routing.

  `expert` devices share their tokens. In the dense form each of them runs its
  experts on all of these; the grouped form has room for k rows of each token.
  """
  if not config.num_experts:
    return config.mlp, 0
  # The router's logits, probabilities and their gradient.
  routed = 3 * FLOAT32 * config.num_experts
  if config.moe != "grouped":
    return config.mlp * config.num_experts, routed
  rows = expert * config.experts_per_token
  # Three buffers of rows: sorted by expert, computed, and sorted back.
  return config.mlp * rows, routed + (
      3 * rows * config.embed * BYTES[config.dtype])


def activation_bytes(
    config: ModelConfig, *, rows: int, length: int, batch: int = 1,
    tensor: int = 1, expert: int = 1, context: int = 1,
) -> int:
  """Bytes kept from the forward for the backward pass, and one layer's peak.

  Args:
    rows, length: of one microbatch, over all devices.
    batch: parts into which the mesh splits the rows, over "expert" too.
    tensor, expert: sizes of these mesh axes.
    context: parts of the length. In attention the length is whole and the
      heads are split instead, so that everything is divided by it.
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
  # Experts are never gathered: a device has its own only.
  layer = config.matrix_parameters(config.num_experts // expert) // tensor
  gathered = config.unroll * layer * size
  return {
      # The gradient of one microbatch, and the sum over microbatches.
      "gradients": 2 * FLOAT32 * trained // shards,
      "activations": activation_bytes(
          config, rows=rows, length=length, batch=batch, tensor=tensor,
          expert=expert, context=context),
      "logits": (
          LOGIT_BUFFERS * FLOAT32 * chunk * config.padded_vocab_size // tensor),
      # The head is gathered once for all chunks, and so is its gradient.
      "gathered weights": gathered + 2 * table * FLOAT32 if parts > 1 else 0,
      # Three bfloat16 tables in place of a gathered float32 head; see
      # `model.head`.
      "head in parts": 0 if config.dtype == "float32" else table * (
          3 * size - (FLOAT32 if parts > 1 else 0)),
  }


def decode_bytes(config: ModelConfig, weights_dtype: str) -> float:
  """Bytes of one weight in the decode loop; int8's scales are left out."""
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
    weights_dtype: str = "compute", prefix_cache_rows: int = 0,
    trained: int | None = None, optimizer_bytes: int | None = None,
    frozen_bytes: int = 0, reference_bytes: int = 0,
    offload: Collection[str] = (),
) -> Estimate:
  """Estimates bytes per device for training, sampling, or both in turn.

  Args:
    config: with the vocabulary filled in.
    data, fsdp, expert, context, tensor: sizes of the mesh.
    rows, sequence_length: of one microbatch, over all devices; rows=0: no
      training.
    loss_chunk: positions whose logits exist at once.
    cache_rows: rows decoded at once, over all devices; 0: no sampling.
    cache_slots: slots of the longest KV cache.
    cache_dtype, weights_dtype: in sampling: "compute" or "int8".
    prefix_cache_rows: sequences that a prefix cache holds besides.
    trained: parameters that an update changes, over all devices; None: all.
    optimizer_bytes: the optimizer's state, over all devices; None: AdamW's
      moments in float32.
    frozen_bytes: frozen parameters at rest, over all devices.
    reference_bytes: the reference, without what it shares with the policy.
    offload: host offload; names in it ("optimizer", "reference") are on the
      devices only while they are needed.
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
        # The decode loop holds every layer gathered over "fsdp" (FSDP's
        # gathers per token would cost more than the token), and cast unless
        # it is quantised; and both tables, if they rest split.
        "decode weights": whole + int(
            config.layers * decode_bytes(config, weights_dtype)
            * config.matrix_parameters(config.num_experts // expert) / tensor),
        "logits": 2 * FLOAT32 * local_rows * config.padded_vocab_size,
    }
  if prefix_cache_rows:
    sampling["prefix cache"] = cache_bytes(
        config, rows=prefix_cache_rows, slots=cache_slots,
        parts=batch * context, tensor=tensor, dtype=cache_dtype)
  if "reference" in waiting:
    scoring = {name: waiting.get(name, training.get(name, 0)) for name in (
        "reference", "logits", "gathered weights")}
  if "optimizer" in waiting:
    training["optimizer"] = waiting["optimizer"]
  return Estimate(persistent, training, sampling, scoring)
