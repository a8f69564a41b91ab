"""A mixture of experts: a router sends each token to k of E small MLPs.

No token is dropped and no expert has a capacity. Both forms compute the same
numbers: "dense" runs every expert on every token, "grouped" sorts the tokens by
expert and multiplies each expert's rows only, as one ragged product.

The weights of the experts are split over devices and stay where they are. The
tokens of the devices that share one set of experts are gathered, each device
adds up what its own experts say, and the sum is scattered back: with k as
large as the number of splits, a token goes nearly everywhere in any case, and
nothing has to be sized for the worst split.

  B: batch  T: length  N: tokens on a device  D: embed  E: experts, of all
  devices or of this one  F: width of an expert  k: experts per token  L: layers

References: Switch Transformer, arXiv 2101.03961; the router of Qwen3-MoE,
arXiv 2505.09388.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from posttrain.model import grouped_kernel
from posttrain.sharding import lengthwise, mesh_axes, platform, spec

Activation = Callable[[jax.Array], jax.Array]
Product = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Routing:
  """Where one layer sends its tokens.

  Attributes:
    choice: [B, T, k] int32, numbers of experts, the most probable first.
    probs: [B, T, E] float32, the router's softmax.
  """

  choice: jax.Array
  probs: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Traffic:
  """What the routers of all layers did; sums are over tokens, not padding.

  Attributes:
    choice: [L, B, T, k] int32, see `Routing`; of padding too.
    load: [L, E] float32, how often an expert was chosen.
    mass: [L, E] float32, summed probabilities; it alone has a gradient.
    entropy: [L] float32, summed over tokens, nats.
    tokens: [L] float32, how many there were.
  """

  choice: jax.Array
  load: jax.Array
  mass: jax.Array
  entropy: jax.Array
  tokens: jax.Array

  def sums(self) -> dict[str, jax.Array]:
    """What a loss adds over microbatches; `objectives.balance` reads it."""
    return {
        "router_load": self.load, "router_mass": self.mass,
        "router_entropy": self.entropy, "router_tokens": self.tokens}


def tally(routing: Routing, counted: jax.Array) -> Traffic:
  """One layer's part of the traffic; `counted` [B, T] bool are its tokens."""
  experts = jnp.arange(routing.probs.shape[-1])
  chosen = (routing.choice[..., None] == experts) & counted[..., None, None]
  total = lambda x: jnp.sum(
      jnp.where(counted[..., None], x, 0), axis=(0, 1), dtype=jnp.float32)
  return Traffic(
      choice=routing.choice,
      load=jnp.sum(chosen, axis=(0, 1, 2), dtype=jnp.float32),
      mass=total(routing.probs),
      entropy=jnp.sum(total(
          jax.scipy.special.entr(jax.lax.stop_gradient(routing.probs)))),
      tokens=jnp.sum(counted, dtype=jnp.float32))


def route(
    x: jax.Array, router: jax.Array, *, chosen: int, normalize: bool,
) -> tuple[Routing, jax.Array]:
  """Chooses experts for [B, T, D]; `router` is [D, E], `chosen` is k.

  The product and the softmax over all experts are float32: the sampler and
  the trainer must not choose apart for want of a few bits.

  Returns:
    The routing, and the weights [B, T, k] of the chosen experts in x's dtype.
  """
  logits = jnp.einsum(
      "btd,de->bte", x, router, preferred_element_type=jnp.float32,
      precision=jax.lax.Precision.HIGHEST)
  probs = jax.nn.softmax(logits, axis=-1)
  weights, choice = jax.lax.top_k(probs, chosen)
  if normalize:
    weights = weights / jnp.sum(weights, axis=-1, keepdims=True)
  return Routing(choice=choice, probs=probs), weights.astype(x.dtype)


def dense(
    x: jax.Array, choice: jax.Array, weights: jax.Array, gate: jax.Array,
    up: jax.Array, down: jax.Array, activation: Activation,
) -> jax.Array:
  """The chosen experts' weighted sum [N, D], by way of all of them.

  Args:
    x: [N, D]. choice, weights: [N, k]; numbers that are not within 0 and
      E - 1 are of experts elsewhere, and add nothing.
    gate, up: [E, D, F]. down: [E, F, D].
    activation: of the gate.
  """
  here = jax.nn.one_hot(choice, gate.shape[0], dtype=x.dtype)
  share = jnp.einsum("nke,nk->en", here, weights)
  hidden = activation(jnp.einsum("nd,edf->enf", x, gate)) * jnp.einsum(
      "nd,edf->enf", x, up)
  return jnp.einsum("enf,efd->nd", hidden * share[..., None], down)


def ragged(
    rows: jax.Array, matrices: jax.Array, sizes: jax.Array) -> jax.Array:
  """XLA's product of each group's rows, see `grouped_kernel.product`."""
  return jax.lax.ragged_dot(rows, matrices, group_sizes=sizes)


def grouped(
    x: jax.Array, choice: jax.Array, weights: jax.Array, gate: jax.Array,
    up: jax.Array, down: jax.Array, activation: Activation,
    product: Product = ragged,
) -> jax.Array:
  """As `dense`, with each expert on its own tokens only.

  The N * k pairs of a token and an expert are sorted by expert, those of
  experts elsewhere last. There is room for all of them, and only the rows of
  this device's experts are computed.

  Args:
    x, choice, weights, gate, up, down, activation: see `dense`.
    product: of rows [M, D], sorted by expert, with each one's matrix
      [E, D, F]; and the rows of each expert, [E] int32.
  """
  experts, pairs = gate.shape[0], choice.size
  here = (choice >= 0) & (choice < experts)
  expert = jnp.where(here, choice, experts).reshape(pairs)
  order = jnp.argsort(expert)  # Stable.
  sizes = jnp.sum(
      expert[:, None] == jnp.arange(experts), axis=0, dtype=jnp.int32)
  # A product says nothing of rows in no group, nor does its gradient.
  inside = (jnp.arange(pairs) < jnp.sum(sizes))[:, None]
  # Permutations: their gradients are gathers too, in a fixed order.
  permute = lambda x, index: x.at[index].get(
      unique_indices=True, mode="promise_in_bounds")
  rows = permute(jnp.repeat(x, choice.shape[1], axis=0), order)
  rows = jnp.where(inside, rows, 0)
  hidden = activation(product(rows, gate, sizes)) * product(rows, up, sizes)
  out = jnp.where(inside, product(hidden, down, sizes), 0)
  out = permute(out, jnp.argsort(order)).reshape(*choice.shape, -1)
  return jnp.einsum("nkd,nk->nd", out, weights)


FORMS = {"dense": dense, "grouped": grouped}
# How "grouped" multiplies on a platform, where that is not XLA's own way.
PRODUCTS: dict[str | None, Product] = {"tpu": grouped_kernel.product}


def form_of(name: str) -> str:
  """What "auto" stands for here: the ragged product pays on a TPU."""
  if name != "auto":
    return name
  here = platform() or jax.default_backend()  # Or those of a plan.
  return "grouped" if here == "tpu" else "dense"


def feed_forward(
    x: jax.Array, router: jax.Array, gate: jax.Array, up: jax.Array,
    down: jax.Array, *, chosen: int, normalize: bool, form: str,
    activation: Activation,
) -> tuple[jax.Array, Routing]:
  """[B, T, D] -> the weighted sum of each token's experts, and its routing.

  Args:
    x: as the stream is sharded. router: [D, E].
    gate, up, down: of all experts, see `dense`; gathered but for the splits
      over "experts" and "mlp".
    chosen, normalize: see `route`.
    form: "dense", "grouped" or "auto".
    activation: of the gate.
  """
  routing, weights = route(x, router, chosen=chosen, normalize=normalize)
  shards, slices = mesh_axes("experts"), mesh_axes("mlp")
  compute = FORMS[form_of(form)]
  kernel = PRODUCTS.get(platform()) if compute is grouped else None
  if kernel:
    compute = functools.partial(grouped, product=kernel)

  def on_device(x, choice, weights, gate, up, down):
    first = 0
    if shards:
      gather = functools.partial(
          jax.lax.all_gather, axis_name=shards, axis=0, tiled=True)
      x, choice, weights = gather(x), gather(choice), gather(weights)
      first = jax.lax.axis_index(shards) * gate.shape[0]
    flat = lambda x: x.reshape(-1, x.shape[-1])
    out = compute(
        flat(x), flat(choice) - first, flat(weights), gate, up, down,
        activation).reshape(x.shape)
    out = jax.lax.psum(out, slices)
    return out if not shards else jax.lax.psum_scatter(
        out, shards, scatter_dimension=0, tiled=True)

  rows = lengthwise(x, None)
  return jax.shard_map(
      on_device, in_specs=(
          rows, rows, rows, *[spec("experts", None, "mlp")] * 2,
          spec("experts", "mlp", None)),
      out_specs=rows, check_vma=kernel is None)(
          x, routing.choice, weights, gate, up, down), routing
