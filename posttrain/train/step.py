"""One optimizer update from any number of microbatches.

A loss returns a numerator, a denominator and a dict of sums. All three are
added over microbatches before the one division, so that packing, microbatch
count and mesh shape leave the gradient alone.

  M: microbatches  R: rows  T: length
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from posttrain.model.transformer import Transformer
from posttrain.train.state import TrainState

# (model, microbatch of [R, T] arrays) -> numerator, denominator, sums.
Loss = Callable[
    [Transformer, dict[str, jax.Array]],
    tuple[jax.Array, jax.Array, dict[str, jax.Array]]]


def accumulate(
    loss: Loss, model: Transformer, batch: dict[str, jax.Array],
    num_microbatches: jax.Array | int,
) -> tuple[Any, dict[str, jax.Array]]:
  """Sums gradients and sums over the first `num_microbatches` of `batch`.

  Args:
    batch: arrays [M, ...]; rows sharded over "batch".
    num_microbatches: at most M; may be traced, so that a varying number of
      microbatches is one compiled program.

  Returns:
    The gradient of the summed numerator (as `model`), and the sums, with
    "numerator" and "denominator" among them; a name that ends in "max" is
    the largest over microbatches and not a sum.
  """
  def pick(index):
    return {
        name: jax.lax.dynamic_index_in_dim(x, index, keepdims=False)
        for name, x in batch.items()}

  def one(model, microbatch):
    numerator, denominator, sums = loss(model, microbatch)
    return numerator, {
        "numerator": numerator, "denominator": denominator, **sums}

  def body(index, carry):
    grads, sums = jax.grad(one, has_aux=True)(model, pick(index))
    merge = lambda name, a, b: (
        jnp.maximum(a, b) if name.endswith("max") else a + b)
    return jax.tree.map(jnp.add, carry[0], grads), {
        name: merge(name, carry[1][name], sums[name]) for name in sums}

  shapes = jax.eval_shape(lambda: one(model, pick(0))[1])
  zeros = (
      jax.tree.map(jnp.zeros_like, model),
      jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes))
  return jax.lax.fori_loop(0, num_microbatches, body, zeros)


def update(
    state: TrainState, batch: dict[str, jax.Array],
    num_microbatches: jax.Array | int, *, loss: Loss,
    optimizer: optax.GradientTransformation, schedule: optax.Schedule,
) -> tuple[TrainState, dict[str, jax.Array]]:
  """One update; jit it with the keywords bound and `state` donated.

  A non-finite loss or gradient leaves the state as it was, `step` included,
  and shows in the metrics: the caller decides what then.

  Returns:
    The new state, and float32 scalars: "loss", "grad_norm" (before
    clipping), "learning_rate", and the loss's sums as they are.
  """
  grads, sums = accumulate(loss, state.model, batch, num_microbatches)
  denominator = jnp.maximum(sums["denominator"], 1).astype(jnp.float32)
  grads = jax.tree.map(lambda g: g / denominator, grads)
  grad_norm = optax.global_norm(grads)
  loss_value = sums["numerator"] / denominator
  finite = jnp.isfinite(loss_value) & jnp.isfinite(grad_norm)
  updates, opt_state = optimizer.update(grads, state.opt_state, state.model)
  learning_rate = schedule(state.step)
  new = TrainState(
      model=jax.tree.map(
          lambda w, u: w - learning_rate * u, state.model, updates),
      opt_state=opt_state, step=state.step + 1)
  new = jax.tree.map(lambda a, b: jnp.where(finite, a, b), new, state)
  metrics = {
      "loss": loss_value, "grad_norm": grad_norm,
      "learning_rate": learning_rate}
  return new, metrics | sums
