"""Bans of budget forcing, and lookups in its tables by row.

  B: rows    V: vocabulary    W: window of recent tokens
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from posttrain.sampler.budget_state import THINK, Budgets, BudgetState
from posttrain.sampler.budget_tables import BudgetTables
from posttrain.sharding import spec


def at(values: jax.Array, index: Any) -> jax.Array:
  """Looks up `values` at [B] indices, one of each axis."""
  return jnp.asarray(values).at[index].get(
      mode="clip", out_sharding=spec("rows"))


def rows_of(values: jax.Array, index: jax.Array) -> jax.Array:
  """Looks up rows of `values` at [B] indices, or values at [B, W]."""
  return jnp.asarray(values).at[index].get(
      mode="clip", out_sharding=spec("rows", None))


def stop_hits(
    tables: BudgetTables, budgets: Budgets, ids: jax.Array) -> jax.Array:
  """Tests if ids [B, n] or [1, n] are stop ids, the tables' or a row's own."""
  stops = functools.reduce(
      jnp.logical_or, (ids == i for i in tables.stop_ids), ids != ids)
  if budgets.stop_ids is None:
    return stops
  return stops | jnp.any(
      budgets.stop_ids[:, :, None] == ids[:, None, :], axis=1)


def banned(
    tables: BudgetTables, budgets: Budgets, state: BudgetState,
    free: jax.Array,
) -> jax.Array:
  """Returns [B, V] bool, ids that the rows `free` [B] may not sample."""
  matcher = tables.matcher
  assert matcher
  thinks = free & (state.phase == THINK)
  # Behind a wait the model has to go on for one token at least, as in s1's
  # public code, which samples there with min_tokens=1.
  waits = thinks & state.just_waited
  # Whole tokens that a delimiter may take away from the thinking.
  spare = state.thinking - budgets.min_thinking_tokens
  short = free & (state.phase <= THINK) & (
      budgets.min_thinking_tokens > 0) & (spare < tables.window)
  plain = thinks & False
  if budgets.suppress is not None and tables.reflections is not None:
    plain = thinks & budgets.suppress

  def masks():
    # The most symbols before the token that a delimiter may complete.
    last = jnp.arange(tables.window) >= tables.window - 1 - spare[:, None]
    most = jnp.sum(jnp.where(last, state.sizes, 0), axis=1) - 1
    limit = jnp.iinfo(matcher.depth.dtype).max
    most = jnp.where(waits, -1, jnp.where(short, most, limit))
    depth = rows_of(matcher.depth, state.node)
    banned = depth > jnp.minimum(most, limit).astype(depth.dtype)[:, None]
    banned = banned | waits[:, None] & matcher.opening
    no_stop = waits | thinks & short & (spare < 0)
    ids = jnp.arange(tables.vocab_size)[None]
    banned = banned | no_stop[:, None] & stop_hits(tables, budgets, ids)
    if tables.reflections is not None:
      banned = banned | plain[:, None] & tables.reflections
    return banned

  # Tables [S, V] are read in steps only in which some row needs them.
  return jax.lax.cond(
      jnp.any(waits | short | plain), masks, lambda: jnp.zeros(
          (*free.shape, tables.vocab_size), bool,
          out_sharding=spec("rows", None)))
