"""One optimizer update from any number of microbatches.

A loss returns a numerator, a denominator and a dict of sums. All three are
added over microbatches before the one division, so that packing, microbatch
count and mesh shape leave the gradient alone.

  M: microbatches  R: rows  T: length
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from posttrain.model.transformer import Transformer
from posttrain.objectives import load_balancing
from posttrain.train import spikes as spikes_lib
from posttrain.train import trainable
from posttrain.train.state import TrainState

# (model, microbatch of [R, T] arrays) -> numerator, denominator, sums.
Loss = Callable[
    [Transformer, dict[str, jax.Array]],
    tuple[jax.Array, jax.Array, dict[str, jax.Array]]]


def accumulate(
    loss: Loss, model: Transformer, batch: dict[str, jax.Array],
    num_microbatches: jax.Array | int, router_aux_coef: float = 0.0,
) -> tuple[Any, dict[str, jax.Array]]:
  """Sums gradients and sums over the first `num_microbatches` of `batch`.

  With a `router_aux_coef` the gradient is also that of `balance_loss`, whose
  counts are of the whole batch: if it has several microbatches, a pass
  without a gradient finds them first.

  Args:
    batch: arrays [M, ...]; rows sharded over "batch", their length over
      "length".
    num_microbatches: at most M; may be traced, so that a varying number of
      microbatches is one compiled program.
    router_aux_coef: weight of the loss that balances the router.

  Returns:
    The gradient of the summed numerator (as `model`; of the balance, times
    the denominator), and the sums, with "numerator" and "denominator" among
    them; a name that ends in "max" is the largest over microbatches and not a
    sum.
  """
  def pick(index):
    return {
        name: jax.lax.dynamic_index_in_dim(x, index, keepdims=False)
        for name, x in batch.items()}

  def sums_of(model, microbatch):
    numerator, denominator, sums = loss(model, microbatch)
    return {"numerator": numerator, "denominator": denominator, **sums}

  def one(model, microbatch, whole):
    sums = sums_of(model, microbatch)
    objective = sums["numerator"]
    if router_aux_coef:
      whole = sums if whole is None else whole
      objective += router_aux_coef * divisor(
          whole) * load_balancing.balance_loss(
          whole["router_load"], sums["router_mass"], whole["router_tokens"])
    return objective, sums

  def merge(a, b):
    return {name: jnp.maximum(a[name], b[name]) if name.endswith("max")
            else a[name] + b[name] for name in a}

  def body(index, carry, whole):
    grads, sums = jax.grad(one, has_aux=True)(model, pick(index), whole)
    return jax.tree.map(jnp.add, carry[0], grads), merge(carry[1], sums)

  nothing = jax.tree.map(
      lambda s: jnp.zeros(s.shape, s.dtype),
      jax.eval_shape(lambda: sums_of(model, pick(0))))
  whole = None
  if router_aux_coef and len(batch["tokens"]) > 1:
    # The loss itself is not among these sums: its head is not computed.
    names = ("denominator", "router_load", "router_tokens")
    whole = jax.lax.fori_loop(
        0, num_microbatches, lambda index, counts: merge(
            counts, sums_of(model, pick(index))),
        {name: nothing[name] for name in names})
  return jax.lax.fori_loop(
      0, num_microbatches, functools.partial(body, whole=whole),
      (jax.tree.map(jnp.zeros_like, model), nothing))


def divisor(sums: dict[str, jax.Array]) -> jax.Array:
  """Divisor of the summed numerator; a float32 scalar.

  It is NaN unless positive, so that the update is not made: a loss with
  nothing in its denominator is a mistake, and 1 in its place would be an
  arbitrary step.
  """
  denominator = jnp.asarray(sums["denominator"], jnp.float32)
  return jnp.where(denominator > 0, denominator, jnp.nan)


def update(
    state: TrainState, batch: dict[str, jax.Array],
    num_microbatches: jax.Array | int, *, loss: Loss,
    optimizer: optax.GradientTransformation, schedule: optax.Schedule,
    router_aux_coef: float = 0.0, spikes: spikes_lib.Rule | None = None,
    skip: bool = False,
) -> tuple[TrainState, dict[str, jax.Array]]:
  """One update of what is trained; jit it with the keywords bound.

  A non-finite loss or gradient, or a spike, leaves the state as it was, and
  shows in the metrics: the caller decides what then.

  Args:
    spikes: when a loss is one; None: never.
    skip: `step` counts an update that was not made too.

  Returns:
    The new state, and float32 scalars: "loss" (without the router's),
    "grad_norm" (before clipping), "learning_rate", "spike" (0 or 1, with a
    rule), and the loss's sums as they are, those of routers as
    `balance.with_metrics` tells them.
  """
  of_trained: Loss = lambda trained, microbatch: loss(
      trainable.join(trained, state.frozen), microbatch)
  grads, sums = accumulate(
      of_trained, state.trained, batch, num_microbatches, router_aux_coef)
  denominator = divisor(sums)
  grads = jax.tree.map(lambda g: g / denominator, grads)
  grad_norm = optax.global_norm(grads)
  loss_value = sums["numerator"] / denominator
  good = jnp.isfinite(loss_value) & jnp.isfinite(grad_norm)
  losses, found = state.losses, {}
  if spikes is not None:
    spike = spikes.is_spike(state.losses, loss_value)
    losses = spikes.add(state.losses, loss_value)
    good, found = good & ~spike, {"spike": spike.astype(jnp.float32)}
  updates, opt_state = optimizer.update(grads, state.opt_state, state.trained)
  learning_rate = schedule(state.step)
  moved = jax.tree.map(
      lambda w, u: w - learning_rate * u, state.trained, updates)
  trained, opt_state, number, losses = jax.tree.map(
      lambda a, b: jnp.where(good, a, b),
      (moved, opt_state, state.step + 1, losses),
      (state.trained, state.opt_state,
       state.step + 1 if skip else state.step, state.losses))
  new = TrainState(
      trained=trained, opt_state=opt_state, step=number, frozen=state.frozen,
      losses=losses)
  metrics = {
      "loss": loss_value, "grad_norm": grad_norm,
      "learning_rate": learning_rate}
  return new, metrics | found | load_balancing.with_metrics(sums)


@dataclasses.dataclass(frozen=True)
class CompiledUpdate:
  """`update`, compiled, which consumes what is trained of its state.

  The frozen part is an argument of its own and no result: it stays where it
  is, for whoever shares it, such as a reference.
  """

  moved: jax.stages.Wrapped

  def __call__(
      self, state: TrainState, batch: dict[str, jax.Array],
      num_microbatches: jax.typing.ArrayLike,
  ) -> tuple[TrainState, dict[str, jax.Array]]:
    new, metrics = self.moved(*self._parts(state), batch, num_microbatches)
    return dataclasses.replace(new, frozen=state.frozen), metrics

  def lower(
      self, state: TrainState, batch: Any, num_microbatches: Any,
  ) -> jax.stages.Lowered:
    """The same program, of abstract arrays."""
    return self.moved.lower(*self._parts(state), batch, num_microbatches)

  def _parts(self, state: TrainState) -> tuple[TrainState, Any]:
    return dataclasses.replace(state, frozen=None), state.frozen


def compile_update(
    loss: Loss, optimizer: optax.GradientTransformation,
    schedule: optax.Schedule, *, router_aux_coef: float = 0.0,
    spikes: spikes_lib.Rule | None = None, skip: bool = False,
) -> CompiledUpdate:
  """`update` with its keywords bound."""
  @functools.partial(jax.jit, donate_argnums=0)
  def moved(state, frozen, batch, num_microbatches):
    state, metrics = update(
        dataclasses.replace(state, frozen=frozen), batch, num_microbatches,
        loss=loss, optimizer=optimizer, schedule=schedule,
        router_aux_coef=router_aux_coef, spikes=spikes, skip=skip)
    return dataclasses.replace(state, frozen=None), metrics

  return CompiledUpdate(moved)
