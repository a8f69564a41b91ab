"""Mixture of experts (MoE): a router sends each token to k of E small MLPs.

No token is dropped and no expert has a capacity. Both forms compute the same
numbers: "dense" runs every expert on every token, "grouped" sorts the tokens by
expert and multiplies each expert's rows only, as one ragged product.

Expert parallelism: the weights of the experts are split over devices and stay
where they are. The tokens of the devices that share one set of experts are
all-gathered, each device sums the outputs of its own experts, and the sum is
reduce-scattered. With k as large as the number of splits, a token goes nearly
everywhere in any case, and no buffer has to be sized for the worst split, as an
all-to-all by expert would need.

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
  """Routing of one layer's tokens.

  Attributes:
    choice: [B, T, k] int32, numbers of experts, the most probable first.
    probs: [B, T, E] float32, the router's softmax.
  """

  choice: jax.Array
  probs: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Traffic:
  """Traffic of the routers of all layers, summed over tokens but padding.

  `tally` makes it for one layer, without the axis L.

  Attributes:
    choice: [L, B, T, k] int32, see `Routing`; of padding too.
    load: [L, E] float32, how often each expert was chosen.
    mass: [L, E] float32, summed probabilities; it alone has a gradient.
    entropy: [L] float32, of the probabilities, summed over tokens, nats.
    tokens: [L] float32, how many tokens were summed.
  """

  choice: jax.Array
  load: jax.Array
  mass: jax.Array
  entropy: jax.Array
  tokens: jax.Array

  def sums(self) -> dict[str, jax.Array]:
    """Returns the sums over tokens, by the names of `load_balancing`."""
    return {
        "router_load": self.load, "router_mass": self.mass,
        "router_entropy": self.entropy, "router_tokens": self.tokens}


def tally(routing: Routing, counted: jax.Array) -> Traffic:
  """Sums up one layer's traffic over the tokens `counted` [B, T] bool."""
  experts = jnp.arange(routing.probs.shape[-1])
  chosen = (routing.choice[..., None] == experts) & counted[..., None, None]
  total = lambda x: jnp.sum(
      jnp.where(counted[..., None], x, 0), axis=(0, 1), dtype=jnp.float32)
  return Traffic(
      choice=routing.choice,
      load=jnp.sum(chosen, axis=(0, 1, 2), dtype=jnp.float32),
      mass=total(routing.probs),
      # Reported only. Its gradient would be infinite where a probability is 0.
      entropy=jnp.sum(total(
          jax.scipy.special.entr(jax.lax.stop_gradient(routing.probs)))),
      tokens=jnp.sum(counted, dtype=jnp.float32))


def route(
    x: jax.Array, router: jax.Array, *, chosen: int, normalize: bool,
) -> tuple[Routing, jax.Array]:
  """Chooses k experts for each token.

  Args:
    x: [B, T, D].
    router: [D, E].
    chosen: k.
    normalize: divide the weights of the chosen experts by their sum.

  Returns:
    The routing, and the weights [B, T, k] of the chosen experts in x's dtype.
  """
  # Product and softmax are float32: rounding would make the sampler and the
  # trainer choose different experts for the same token.
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
  """Sums the chosen experts' outputs [N, D], computing all experts.

  Args:
    x: [N, D].
    choice, weights: [N, k]. A choice that is not within 0 and E - 1 is an
      expert of another device, and adds nothing.
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
  """Multiplies each group's rows by its matrix, as XLA does.

  Arguments and result: see `grouped_kernel.product`.
  """
  return jax.lax.ragged_dot(rows, matrices, group_sizes=sizes)


def grouped(
    x: jax.Array, choice: jax.Array, weights: jax.Array, gate: jax.Array,
    up: jax.Array, down: jax.Array, activation: Activation,
    product: Product = ragged,
) -> jax.Array:
  """Sums the chosen experts' outputs, computing each expert's tokens only.

  The N * k pairs of a token and an expert are sorted by expert, those of
  other devices' experts last. There is room for all pairs, and only the rows
  of this device's experts are computed.

  Args:
    x, choice, weights, gate, up, down, activation: see `dense`.
    product: (rows, matrices, sizes) -> rows, see `grouped_kernel.product`.
  """
  experts, pairs = gate.shape[0], choice.size
  here = (choice >= 0) & (choice < experts)
  expert = jnp.where(here, choice, experts).reshape(pairs)
  order = jnp.argsort(expert)  # Stable, so that sums have one order.
  sizes = jnp.sum(
      expert[:, None] == jnp.arange(experts), axis=0, dtype=jnp.int32)
  # Rows in no group are undefined in the product, and so is their gradient:
  # they are masked before and behind it.
  inside = (jnp.arange(pairs) < jnp.sum(sizes))[:, None]
  # Permutations: as their indices are unique, no two rows are summed in their
  # gradients, which so have a fixed order.
  permute = lambda x, index: x.at[index].get(
      unique_indices=True, mode="promise_in_bounds")
  rows = permute(jnp.repeat(x, choice.shape[1], axis=0), order)
  rows = jnp.where(inside, rows, 0)
  hidden = activation(product(rows, gate, sizes)) * product(rows, up, sizes)
  out = jnp.where(inside, product(hidden, down, sizes), 0)
  out = permute(out, jnp.argsort(order)).reshape(*choice.shape, -1)
  return jnp.einsum("nkd,nk->nd", out, weights)


FORMS = {"dense": dense, "grouped": grouped}
# Products of the "grouped" form by platform, where XLA's own is not the best.
PRODUCTS: dict[str | None, Product] = {"tpu": grouped_kernel.product}


def form_of(name: str) -> str:
  """Resolves "auto": grouped on a TPU, where it pays, and dense elsewhere."""
  if name != "auto":
    return name
  # Of the mesh, which in a plan is another machine's.
  here = platform() or jax.default_backend()
  return "grouped" if here == "tpu" else "dense"


def feed_forward(
    x: jax.Array, router: jax.Array, gate: jax.Array, up: jax.Array,
    down: jax.Array, *, chosen: int, normalize: bool, form: str,
    activation: Activation,
) -> tuple[jax.Array, Routing]:
  """Routes tokens, and sums the weighted outputs of each token's experts.

  Args:
    x: [B, T, D], sharded as the residual stream.
    router: [D, E].
    gate, up, down: of all experts, see `dense`; gathered but for the splits
      over "experts" and "mlp".
    chosen, normalize: see `route`.
    form: "dense", "grouped" or "auto".
    activation: of the gate.

  Returns:
    [B, T, D] sharded as x; and the routing.
  """
  routing, weights = route(x, router, chosen=chosen, normalize=normalize)
  shards, slices = mesh_axes("experts"), mesh_axes("mlp")
  compute = FORMS[form_of(form)]
  kernel = PRODUCTS.get(platform()) if compute is grouped else None
  if kernel:
    compute = functools.partial(grouped, product=kernel)

  def on_device(x, choice, weights, gate, up, down):
    # Expert parallelism: all tokens of the group of devices, own experts only.
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
    # Tensor parallelism: each device has a slice of an expert's width.
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
