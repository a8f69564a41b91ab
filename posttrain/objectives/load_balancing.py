"""Load-balancing loss of a router over its experts, and measures of the load.

The loss is a product of two means over the tokens of all layers, as in
transformers' `load_balancing_loss_func`: E * sum_e f_e P_e, where f_e is how
often expert e was chosen per token and P_e the mean of its probability. It is
k when the load is even. The counts f have no gradient, so in the probabilities
the loss is a plain sum: once the counts of the whole batch are known, its
parts may be added over microbatches, packed rows and devices like those of any
other loss. A mean of microbatches' own losses would ask each of them to be
even, and would change with their number.

  L: layers    E: experts    k: experts per token

References: Switch Transformer, arXiv 2101.03961, equations (4) to (6); on
counts of the whole batch, arXiv 2501.11873.
"""

import jax
import jax.numpy as jnp

Sums = dict[str, jax.Array]


def balance_loss(
    load: jax.Array, mass: jax.Array, tokens: jax.Array) -> jax.Array:
  """Computes the loss, or the part of it that `mass` stands for.

  Args:
    load: [L, E] float32, choices per layer and expert, of the whole batch.
    mass: [L, E] float32, summed probabilities, of any part of it.
    tokens: [L] float32, of the whole batch, padding apart.

  Returns:
    A float32 scalar; with a gradient in `mass` only.
  """
  # A batch without a token has a loss of 0.
  rows = jnp.maximum(jnp.sum(tokens), 1)
  share = jax.lax.stop_gradient(jnp.sum(load, axis=0) / rows)
  return load.shape[1] * jnp.sum(share * jnp.sum(mass, axis=0) / rows)


def with_metrics(sums: Sums) -> Sums:
  """Turns the sums of a batch's routers into three figures.

  `router/aux_loss` is `balance_loss`; `router/load_max` the load of the
  busiest expert of any layer, over an even share: 1 to E / k;
  `router/entropy` the mean of the router's distributions, nats. A batch
  without routers stays as it is.
  """
  if "router_load" not in sums:
    return sums
  load, tokens = sums["router_load"], sums["router_tokens"]
  even = jnp.mean(load, axis=1, keepdims=True)
  kept = {name: value for name, value in sums.items()
          if not name.startswith("router_")}
  return kept | {
      "router/aux_loss": balance_loss(load, sums["router_mass"], tokens),
      "router/load_max": jnp.max(load / jnp.where(even > 0, even, 1)),
      "router/entropy": jnp.mean(
          sums["router_entropy"] / jnp.maximum(tokens, 1))}
