"""FLOPs of kernels, counted by hand: HLO shows only that they are called."""

import math

from posttrain.plan.hlo import Computation, Instruction

# Products of a [T, S] with a [., H] matrix in each kernel of splash attention:
# scores and values; then scores, dv, dp and dk; then scores, dp and dq.
_PRODUCTS = {"fwd": 2, "dkv": 4, "dq": 3}
DECODE = "decode_attention"  # `model.decode_kernel`.
# XLA's own, of `jax.lax.ragged_dot`: the product, and where its groups begin.
RAGGED, RAGGED_INDEX = "ragged-dot", "ragged-dot-metadata"
RAGGED_GRADIENT = "tgmm"  # `model.grouped_kernel`: of the matrices.
# Of all pairs of positions, a causal mask shows half.
VISIBLE = 0.5


def is_kernel(instruction: Instruction) -> bool:
  return instruction.opcode == "custom-call" and instruction.attribute(
      "custom_call_target") == '"tpu_custom_call"'


def flops(
    computation: Computation, instruction: Instruction, experts: int = 0,
) -> int | None:
  """Models the FLOPs of a kernel; 0 for another instruction.

  None for a kernel of another kind. Counts [.., N, T, H] queries
  against [.., K, S, H] keys, the first two operands of floating point, as
  causal; and the sampler's [B, K, G, H] queries against all S slots, as if
  none were left out. Of a product of [N, in] rows by group with [E, in, out]
  weights, or of the gradient of these, rows of this device's E experts, as if
  the router were balanced.

  Args:
    experts: of the model, on all devices together.
  """
  if not is_kernel(instruction):
    return 0
  if instruction.name.startswith(RAGGED_INDEX):
    return 0
  arrays = [computation[name].array for name in instruction.operands]
  if instruction.name.startswith(DECODE):
    asked, cached = [each.dims for each in arrays if len(each.dims) == 4][:2]
    return 2 * 2 * math.prod(asked) * cached[2]
  floats = [array.dims for array in arrays if array.dtype in ("bf16", "f32")]
  parts = instruction.name.split("_")
  gradient = RAGGED_GRADIENT in parts
  if experts and (gradient or instruction.name.startswith(RAGGED)):
    # The rows have room for all tokens.
    rows, weights = floats
    return 2 * rows[0] * math.prod(
        instruction.array.dims if gradient else weights) // experts
  products = [count for name, count in _PRODUCTS.items() if name in parts]
  if "splash" not in parts or not products or len(floats) < 2:
    return None
  queries, keys = floats[:2]
  return int(
      2 * products[0] * math.prod(queries) * keys[-2] * VISIBLE)
