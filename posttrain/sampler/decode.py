"""The compiled part of sampling: prefill, and a chunk of the decode loop.

A prompt is prefilled once; its cache is copied to its G samples, whose first
tokens are drawn from the same logits. The loop then runs up to `steps` tokens
on the device, with budget forcing inside, before the host looks.

  P: prompts  G: samples per prompt  B: rows, P * G  T: prompt slots
  S: cache slots  N: steps of a chunk  V: vocabulary (true)  D: embed
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from posttrain.model import cache as kv
from posttrain.model.block import Block
from posttrain.model.transformer import Transformer
from posttrain.sampler import budget, choice
from posttrain.sharding import shard, spec


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Carry:
  """What lives on the device between chunks.

  Attributes:
    cache: of every layer, [B, S, ...].
    hidden: [B, D], from which each row's next token is drawn.
    state: where each row's budget stands.
  """

  cache: kv.KVCache
  hidden: jax.Array
  state: budget.BudgetState


@functools.partial(jax.jit, static_argnames=("group_size", "slots"))
def prefill(
    model: Transformer, tokens: jax.Array, segment_ids: jax.Array,
    in_thinking: jax.Array, done: jax.Array, tables: budget.BudgetTables,
    budgets: budget.Budgets, *, group_size: int, slots: int,
) -> Carry:
  """Prompts, aligned to the right, into the carry of their samples.

  Args:
    tokens, segment_ids: [P, T] int32; padding (on the left) has segment 0.
    in_thinking, done: [B] bool, see `budget.init`.
    budgets: of the B rows.
    group_size: G. slots: S, at least T + 1.
  """
  positions = jnp.maximum(jnp.cumsum(segment_ids, axis=1) - 1, 0)
  hidden, cache = model.prefill(tokens, positions, segment_ids)
  last = jnp.repeat(
      tokens[:, -1], group_size, out_sharding=spec("batch"))
  return Carry(
      cache=kv.grow(kv.fan_out(cache, group_size), slots),
      hidden=jnp.repeat(
          hidden[:, -1], group_size, axis=0,
          out_sharding=spec("batch", "act_embed")),
      state=budget.init(tables, budgets, in_thinking, last, done))


@functools.partial(jax.jit, static_argnames="slots")
def grow(carry: Carry, *, slots: int) -> Carry:
  """The same carry with a cache of `slots` slots."""
  return dataclasses.replace(carry, cache=kv.grow(carry.cache, slots))


@functools.partial(
    jax.jit, static_argnames=("params", "steps"), donate_argnames="carry")
def decode(
    model: Transformer, carry: Carry, prompt_lengths: jax.Array,
    keys: jax.Array, script: jax.Array, tables: budget.BudgetTables,
    budgets: budget.Budgets, *, params: choice.SamplingParams, steps: int,
) -> tuple[Carry, dict[str, jax.Array]]:
  """Up to `steps` tokens for every row, or until all rows are done.

  Args:
    carry: donated. Its cache has room for `steps` more slots.
    prompt_lengths: [B] int32.
    keys: [B, 2] uint32, see `choice.row_keys`.
    script: [B, N] int32, choices to take instead of drawing; -1 draws.

  Returns:
    The carry, and the record of each step, all [B, N]: "token",
    "provenance" (0: nothing emitted), "logprob", "dropped", "raw"; and of a
    model that has them "experts" [B, N, L, k], see `Rollouts.experts`.
  """
  rows = prompt_lengths.shape[0]
  blocks = model.unstacked()  # Outside of the loop: sliced and cast once.
  empty = lambda dtype, fill=0: jnp.full(
      (rows, steps), fill, dtype, out_sharding=spec("batch", None))
  record = {
      "token": empty(jnp.int32), "provenance": empty(jnp.int32),
      "logprob": empty(jnp.float32), "dropped": empty(jnp.int32),
      "raw": empty(jnp.int32, -1)}
  if model.config.num_experts:
    record["experts"] = jnp.zeros(
        (rows, steps, model.config.layers, model.config.experts_per_token),
        experts_dtype(model), out_sharding=spec("batch", None, None, None))

  def running(loop):
    step, carry, _ = loop
    return (step < steps) & jnp.any(~carry.state.done)

  def body(loop):
    step, carry, record = loop
    state, new = _choose(
        model, carry, script[:, step], keys, tables, budgets, params)
    carry, experts = _feed(model, blocks, carry, state, prompt_lengths)
    if experts is not None:
      new["experts"] = experts
    record = {
        name: kv.write_slot(record[name], new[name][:, None], step)
        for name in record}
    return step + 1, carry, record

  _, carry, record = jax.lax.while_loop(
      running, body, (jnp.int32(0), carry, record))
  return carry, record


def _choose(
    model: Transformer, carry: Carry, script: jax.Array, keys: jax.Array,
    tables: budget.BudgetTables, budgets: budget.Budgets,
    params: choice.SamplingParams,
) -> tuple[budget.BudgetState, dict[str, Any]]:
  """Logits -> a token per row, sampled or forced -> the next budget state."""
  logits = shard(model.logits(carry.hidden), "batch", None)
  logits = logits[:, :tables.vocab_size]
  forced, banned = budget.plan(tables, budgets, carry.state)
  drawn, logprobs = choice.choose(
      logits, banned, choice.fold_position(keys, carry.state.draws), params,
      given=script)
  was_forced = forced >= 0
  state, emit = budget.advance(
      tables, budgets, carry.state, jnp.where(was_forced, forced, drawn),
      was_forced)
  sampled = emit.provenance == budget.SAMPLED
  return state, {
      "token": emit.token, "provenance": emit.provenance,
      "logprob": jnp.where(sampled, logprobs, 0.0), "dropped": emit.dropped,
      "raw": jnp.where(was_forced | carry.state.done, -1, drawn)}


def _feed(
    model: Transformer, blocks: list[Block], carry: Carry,
    state: budget.BudgetState, prompt_lengths: jax.Array,
) -> tuple[Carry, jax.Array | None]:
  """Runs the model on each row's last token, at its own position.

  Returns:
    The carry, and the experts [B, L, k] that the token went to, from 1; 0 in
    rows that feed nothing. None without experts.
  """
  position = jnp.where(
      state.done, -1, prompt_lengths + state.num_tokens - 1)
  # Slots at or after it hold tokens that were taken back.
  cache = kv.retract(carry.cache, position)
  hidden, cache, experts = model.decode(state.last, position, cache, blocks)
  if experts is not None:
    experts = jnp.where(state.done[:, None, None], 0, experts + 1)
  return Carry(cache=cache, hidden=hidden, state=state), experts


def experts_dtype(model: Transformer) -> Any:
  """Of numbers from 1 to E."""
  return jnp.uint8 if model.config.num_experts < 256 else jnp.uint16
