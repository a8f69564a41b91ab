"""One optimizer update from any number of microbatches (gradient accumulation).

An objective returns terms and sums (`objectives.columns`). Numerators,
denominators and sums are added over microbatches before any division, so that
packing, microbatch count and mesh shape leave the gradient alone.

  M: microbatches  R: rows  T: length
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from posttrain import sharding
from posttrain.model import token_logprobs
from posttrain.model.transformer import Transformer
from posttrain.objectives import columns as columns_lib
from posttrain.objectives import load_balancing
from posttrain.objectives.columns import Objective, Sums, Terms
from posttrain.train import spikes as spikes_lib
from posttrain.train import trainable
from posttrain.train.state import TrainState

Batch = dict[str, jax.Array]
# `evaluate` of an objective: (model, microbatch of [R, T] arrays) -> both.
Loss = Callable[[Transformer, Batch], tuple[Terms, Sums]]


def stack(
    batch: Mapping[str, np.ndarray], num_microbatches: int,
    put: Callable[..., Any] = sharding.put,
) -> dict[str, Any]:
  """Cuts rows into microbatches, padded to what the mesh divides.

  Padding is zeros: segment 0, outside every loss. As denominators are sums over
  the whole batch, it changes no gradient.

  Args:
    batch: arrays [rows] or [rows, T, ...], the same on every host.
    num_microbatches: M.
    put: makes device arrays; `sharding.abstract` gives their shapes only.

  Returns:
    Arrays [M, R] or [M, R, T, ...], sharded over "batch" and "length".
  """
  multiple = num_microbatches * sharding.axis_size("batch")

  def fold(array: np.ndarray) -> Any:
    # Every microbatch must have the same number of rows, which the mesh
    # divides: all of them run in one compiled loop.
    padding = -len(array) % multiple
    array = np.pad(array, [(0, padding)] + [(0, 0)] * (array.ndim - 1))
    array = array.reshape(num_microbatches, -1, *array.shape[1:])
    axes = (None, "batch", "length", *(None,) * array.ndim)[:array.ndim]
    return put(array, *axes)

  return {name: fold(array) for name, array in batch.items()}


def evaluate(
    objective: Objective, model: Transformer, batch: Batch, *, chunk: int,
    temperature: float = 1.0,
) -> tuple[Terms, Sums]:
  """Computes the terms and sums of one microbatch.

  Args:
    objective: see `objectives.columns`. It is given `batch`, `logprobs`,
      `entropy` and, of a model that has them, the `experts` [R, T, L, k] that
      were chosen; each row whole along its length.
    batch: [R, T] arrays; rows sharded over "batch", lengths over "length".
    chunk, temperature: see `token_logprobs.of_hidden`.
  """
  logprobs, entropy, traffic = token_logprobs.token_logprobs(
      model, batch, chunk=chunk, temperature=temperature)
  columns = batch | {"logprobs": logprobs, "entropy": entropy}
  if traffic is not None:
    columns["experts"] = jnp.moveaxis(traffic.choice, 0, 2)
  # Context parallelism splits the length; these arrays are small.
  terms, sums = columns_lib.call(
      objective, {name: sharding.whole_length(x)
                  for name, x in columns.items()}, {})
  return terms, sums | ({} if traffic is None else traffic.sums())


def accumulate(
    loss: Loss, model: Transformer, batch: Batch,
    num_microbatches: jax.Array | int, router_aux_coef: float = 0.0,
) -> tuple[Any, Terms, Sums]:
  """Sums gradients, terms and sums over the first microbatches of `batch`.

  There is one gradient, and each term has a denominator of its own: so the
  numerators of all terms are put over the denominator of the first by name,
  which `update` divides by in the end. If there are several microbatches,
  that takes the denominators of the whole batch beforehand, and those of
  `balance_loss` (with a `router_aux_coef`) its counts. A pass over them finds
  these; XLA leaves out of it what they do not depend on, which for
  denominators is the model.

  Args:
    batch: arrays [M, ...].
    num_microbatches: at most M; may be traced, so that a varying number of
      microbatches is one compiled program.
    router_aux_coef: weight of the loss that balances the router.

  Returns:
    The gradient of the loss (as `model`) times the first denominator, the
    terms, and the sums. A sum whose name ends in "max" is the largest over
    microbatches.
  """
  def of_microbatch(model, index):
    return loss(model, {
        name: jax.lax.dynamic_index_in_dim(x, index, keepdims=False)
        for name, x in batch.items()})

  def scaled_loss(model, index, whole):
    terms, sums = of_microbatch(model, index)
    whole = _shared_by_microbatches(terms, sums) if whole is None else whole
    return _over_first(terms, sums, whole, router_aux_coef), (terms, sums)

  def body(index, carry, whole):
    grads, (terms, sums) = jax.grad(scaled_loss, has_aux=True)(
        model, index, whole)
    add = functools.partial(jax.tree.map, jnp.add)
    return add(carry[0], grads), add(carry[1], terms), _merged(carry[2], sums)

  nothing = jax.tree.map(
      lambda s: jnp.zeros(s.shape, s.dtype),
      jax.eval_shape(lambda: of_microbatch(model, 0)))
  whole = None
  if len(batch["tokens"]) > 1 and (len(nothing[0]) > 1 or router_aux_coef):
    whole = jax.lax.fori_loop(
        0, num_microbatches, lambda index, found: jax.tree.map(
            jnp.add, found,
            _shared_by_microbatches(*of_microbatch(model, index))),
        _shared_by_microbatches(*nothing))
  return jax.lax.fori_loop(
      0, num_microbatches, functools.partial(body, whole=whole),
      (jax.tree.map(jnp.zeros_like, model), *nothing))


def _merged(a: Sums, b: Sums) -> Sums:
  return {name: jnp.maximum(a[name], b[name]) if name.endswith("max")
          else a[name] + b[name] for name in a}


def _shared_by_microbatches(terms: Terms, sums: Sums) -> Sums:
  """Picks what the loss of a microbatch needs of the whole batch."""
  return {f"denominator/{name}": jnp.asarray(term.denominator, jnp.float32)
          for name, term in terms.items()} | {
              name: sums[name] for name in ("router_load", "router_tokens")
              if name in sums}


def _over_first(
    terms: Terms, sums: Sums, whole: Sums, router_aux_coef: float,
) -> jax.Array:
  """Adds up all terms, over the first one's denominator."""
  divisors = {name: divisor(whole[f"denominator/{name}"]) for name in terms}
  first = min(terms)
  total = terms[first].coefficient * terms[first].numerator
  for name in sorted(terms)[1:]:
    share = divisors[first] / divisors[name]
    total += terms[name].coefficient * terms[name].numerator * share
  if router_aux_coef:
    total += router_aux_coef * divisors[first] * load_balancing.balance_loss(
        whole["router_load"], sums["router_mass"], whole["router_tokens"])
  return total


def divisor(denominator: jax.Array) -> jax.Array:
  """Makes a term's divisor of its denominator; a float32 scalar.

  It is NaN unless positive, so that the update is not made: a loss with
  nothing in its denominator is a mistake, and 1 in its place would be an
  arbitrary step.
  """
  denominator = jax.lax.stop_gradient(jnp.asarray(denominator, jnp.float32))
  return jnp.where(denominator > 0, denominator, jnp.nan)


def metrics_of_terms(terms: Terms) -> Sums:
  """Computes the loss, its terms if there are several, and denominators."""
  values = {name: term.numerator / divisor(term.denominator)
            for name, term in terms.items()}
  loss = functools.reduce(jnp.add, (
      terms[name].coefficient * values[name] for name in sorted(terms)))
  return {"loss": loss} | {
      f"denominator/{name}": term.denominator
      for name, term in terms.items()} | ({
          f"loss/{name}": value for name, value in values.items()
      } if len(terms) > 1 else {})


def update(
    state: TrainState, batch: Batch, num_microbatches: jax.Array | int, *,
    loss: Loss, optimizer: optax.GradientTransformation,
    schedule: optax.Schedule, router_aux_coef: float = 0.0,
    spikes: spikes_lib.Rule | None = None, skip: bool = False,
) -> tuple[TrainState, dict[str, jax.Array]]:
  """Updates the trained parameters once; jit it with the keywords bound.

  A non-finite loss or gradient, or a spike, leaves the state as it was, and
  shows in the metrics: the caller decides what then.

  Args:
    spikes: the rule by which a loss is a spike; None: none is.
    skip: `step` also counts an update that was not made.

  Returns:
    The new state, and float32 scalars: those of `metrics_of_terms` (without
    the router's loss), "grad_norm" (before clipping), "learning_rate",
    "spike" (0 or 1, with a rule), and the objective's sums as they are, those
    of routers as `load_balancing.with_metrics` tells them.
  """
  of_trained: Loss = lambda trained, microbatch: loss(
      trainable.join(trained, state.frozen), microbatch)
  grads, terms, sums = accumulate(
      of_trained, state.trained, batch, num_microbatches, router_aux_coef)
  denominator = divisor(terms[min(terms)].denominator)
  grads = jax.tree.map(lambda g: g / denominator, grads)
  metrics = metrics_of_terms(terms)
  loss_value = metrics["loss"]
  grad_norm = optax.global_norm(grads)
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
  metrics |= {"grad_norm": grad_norm, "learning_rate": learning_rate}
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
    """Lowers the same program for abstract arrays."""
    return self.moved.lower(*self._parts(state), batch, num_microbatches)

  def _parts(self, state: TrainState) -> tuple[TrainState, Any]:
    return dataclasses.replace(state, frozen=None), state.frozen


def compile_update(
    function: Callable[..., tuple[TrainState, dict[str, jax.Array]]],
) -> CompiledUpdate:
  """Compiles `update` with its keywords bound."""
  @functools.partial(jax.jit, donate_argnums=0)
  def moved(state, frozen, batch, num_microbatches):
    state, metrics = function(
        dataclasses.replace(state, frozen=frozen), batch, num_microbatches)
    return dataclasses.replace(state, frozen=None), metrics

  return CompiledUpdate(moved)
