"""Decode loop: up to N steps on the device before the host syncs.

Prompts were prefilled before (`prefill`), and budget forcing is inside.

All that a request asks for is data of its row (`Rows`), so one program serves
any mixture of requests, and any requests that come after them in the same rows.

A step draws a token of every row from the hidden state that it has (`_choose`),
and then runs the model on that token (`_feed`), which gives the next hidden
state and extends the KV cache.

  B: rows  S: cache slots  N: steps of a chunk
  V: vocabulary (without padding)  D: embed  K: ids of a row  L: layers
  k: experts per token
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from posttrain.model import cache as kv
from posttrain.model.block import Block
from posttrain.model.config import ModelConfig
from posttrain.model.transformer import Transformer
from posttrain.sampler import (
  budget,
  budget_state,
  confidence,
  logits_processors,
  token_sampling,
)
from posttrain.sharding import shard, spec


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Carry:
  """State of the decode loop, which stays on the device between chunks.

  Attributes:
    cache: keys and values of every layer.
    hidden: [B, D], from which each row's next token is drawn.
    state: where each row's budget stands.
    processor_state: of the logits processor, a pytree of [B, ...]; None
      without one.
  """

  cache: kv.KVCache
  hidden: jax.Array
  state: budget.BudgetState
  processor_state: Any = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rows:
  """Requests of a batch as arrays, a row each.

  Attributes:
    prompt_lengths: [B] int32, tokens.
    keys: [B, 2] uint32, see `token_sampling.row_keys`.
    budgets: limits and stop ids.
    params: temperature and truncation.
    banned_ids: [B, K] int32, never drawn; -1 for none. None: no row has any.
  """

  prompt_lengths: jax.Array
  keys: jax.Array
  budgets: budget.Budgets
  params: token_sampling.RowParams
  banned_ids: jax.Array | None = None


@dataclasses.dataclass(frozen=True)
class Recorded:
  """Choice of what a step records beyond tokens and logprobs; static.

  Attributes:
    counts: record "counts" [B, N, 5] int32, of the row after the step:
      thinking and answer tokens, waits, how the thinking ended, and its steps.
    model_logprobs: record "model_logprob" [B, N] float32, of the emitted token
      under the model alone: no temperature, truncation, ban or logits
      processor.
    top_logprobs: how many of the likeliest tokens of the distribution that was
      sampled from to record, as "top_tokens" and "top_logprobs".
  """

  counts: bool = False
  model_logprobs: bool = False
  top_logprobs: int = 0


PLAIN = Recorded()

# A budget schedule changes budgets while rows decode: (budgets, state) ->
# budgets, pure, traced, and called before every step of the loop. It may lower
# max_thinking_tokens below what a row has thought, which then closes. It cannot
# raise max_tokens, which the row's cache slots were counted by. The waits that
# are left are in the state, not in the budgets.
BudgetSchedule = Callable[[budget.Budgets, budget.BudgetState], budget.Budgets]


# Here and in `decode` some arrays of the model are not read. They are on the
# device all the same, and `keep_unused` leaves them among the program's
# arguments, so that a plan which adds up the arguments' bytes counts them.
@functools.partial(
    jax.jit, static_argnames="weights_dtype", keep_unused=True)
def unstacked(
    model: Transformer, *, weights_dtype: str = "compute",
) -> tuple[Transformer, list[Block]]:
  """Prepares the weights for the loop, once for all chunks of a call.

  If each chunk's program sliced and cast the stacked layers, it would copy them
  anew, which reads as many bytes as a decode step or two; and it would gather
  the embedding tables for every token. Arrays that are whole already are not
  copied.

  Args:
    model: as it trains.
    weights_dtype: of the layers' matrices, "compute" or "int8".

  Returns:
    The model with its tables gathered, and its layers one by one.
  """
  tables = dict.fromkeys(("embedding", model.head_name))
  return model.gathered(*tables), model.unstacked(weights_dtype)


@functools.partial(jax.jit, static_argnames="slots")
def resize(carry: Carry, *, slots: int) -> Carry:
  """Changes the cache of a carry to `slots` slots; see `cache.resize`."""
  return dataclasses.replace(carry, cache=kv.resize(carry.cache, slots))


@functools.partial(
    jax.jit, static_argnames=(
        "steps", "recorded", "logits_processor", "budget_schedule"),
    donate_argnames="carry", keep_unused=True)
def decode(
    model: Transformer, blocks: list[Block], carry: Carry, rows: Rows,
    script: jax.Array, until: jax.Array, tables: budget.BudgetTables, *,
    steps: int, recorded: Recorded = PLAIN,
    logits_processor: logits_processors.LogitsProcessor | None = None,
    budget_schedule: BudgetSchedule | None = None,
) -> tuple[Carry, dict[str, jax.Array]]:
  """Decodes up to `steps` tokens of every row, or until `until` rows are done.

  Args:
    model, blocks: as `unstacked` makes them.
    carry: donated. In its cache no row that is not done has more than
      S - `steps` tokens.
    rows: what each row's request asks for.
    script: [B, N] int32, choices to take instead of drawing; -1 draws.
    until: scalar int32.
    tables: token ids of the thinking strings.
    steps: N.
    recorded: what is recorded of a step besides tokens and logprobs.
    logits_processor, budget_schedule: change each step's logits and budgets.

  Returns:
    The carry, and the record of the steps, [B, N] each: "token", "provenance"
    (0: nothing was emitted), "logprob", "dropped" (earlier tokens to retract
    first), "raw" (the choice), and what `recorded` names. A mixture of experts
    has "experts" [B, N, L, k] too, see `Rollouts.experts`; a state with running
    confidence has "entropy" and "confidence".
  """
  # A while loop, not a scan: the chunk ends as soon as enough rows are done, so
  # that neither the device nor the queue waits for its last steps.
  def running(loop):
    step, carry, _ = loop
    return (step < steps) & (jnp.sum(carry.state.done) < until)

  def body(loop):
    step, carry, record = loop
    carry, new = _choose(
        model, carry, script[:, step],
        _scheduled(budget_schedule, rows, carry.state), tables, recorded,
        logits_processor)
    carry, experts = _feed(model, blocks, carry, rows)
    # The experts of the token that was emitted in this very step.
    if experts is not None:
      new["experts"] = experts
    record = {
        name: kv.write_slots(record[name], new[name][:, None], step)
        for name in record}
    return step + 1, carry, record

  _, carry, record = jax.lax.while_loop(
      running, body,
      (jnp.int32(0), carry,
       _empty_record(
           script.shape, recorded, model.config, carry.state.running)))
  return carry, record


def _scheduled(
    budget_schedule: BudgetSchedule | None, rows: Rows,
    state: budget.BudgetState,
) -> Rows:
  """Applies the budget schedule to the rows of one step."""
  if budget_schedule is None:
    return rows
  budgets = budget_schedule(rows.budgets, state)
  # A row that went on longer than it asked for would overwrite its own first
  # slots, which the ring gives it until then only.
  most = jnp.minimum(budgets.max_tokens, rows.budgets.max_tokens)
  return dataclasses.replace(
      rows, budgets=dataclasses.replace(budgets, max_tokens=most))


def _empty_record(
    shape: tuple[int, ...], recorded: Recorded, config: ModelConfig,
    running: confidence.Running | None,
) -> dict[str, jax.Array]:
  """Makes the record of a chunk of no steps; `shape` is (B, N)."""
  def empty(dtype, fill=0, *last):
    axes = ("rows", None, *(None for _ in last))
    return jnp.full((*shape, *last), fill, dtype, out_sharding=spec(*axes))

  record = {
      "token": empty(jnp.int32), "provenance": empty(jnp.int32),
      "logprob": empty(jnp.float32), "dropped": empty(jnp.int32),
      "raw": empty(jnp.int32, -1)}
  if config.num_experts:
    record["experts"] = empty(
        experts_dtype(config), 0, config.layers, config.experts_per_token)
  if recorded.counts:
    record["counts"] = empty(jnp.int32, 0, 5)
  if recorded.model_logprobs:
    record["model_logprob"] = empty(jnp.float32)
  if running is not None:
    record |= {"entropy": empty(jnp.float32), "confidence": empty(jnp.float32)}
  if recorded.top_logprobs:
    count = recorded.top_logprobs
    record |= {"top_tokens": empty(jnp.int32, 0, count),
               "top_logprobs": empty(jnp.float32, 0, count)}
  return record


def _choose(
    model: Transformer, carry: Carry, script: jax.Array, rows: Rows,
    tables: budget.BudgetTables, recorded: Recorded,
    logits_processor: logits_processors.LogitsProcessor | None,
) -> tuple[Carry, dict[str, Any]]:
  """Chooses a token for each row, sampled or forced, and advances its budget.

  Returns:
    The carry with the next budget state, whose last tokens are not fed yet;
    and the step's record, [B] each.
  """
  # Each device has the whole vocabulary of its rows, as sorts and noise need
  # it, but without the padding of the table: its ids are no tokens.
  logits = shard(model.logits(carry.hidden), "rows", None)[
      :, :tables.vocab_size]
  forced, banned = budget.plan(tables, rows.budgets, carry.state)
  was_forced = forced >= 0
  drawn, distribution = _draw(
      logits, was_forced, banned, carry, rows, tables, logits_processor)
  drawn = jnp.where(script >= 0, script, drawn)
  token = jnp.where(was_forced, forced, drawn)
  logprobs = token_sampling.logprob_of(distribution, token)
  # NaN logits give a NaN distribution, whichever token it is.
  failed = ~carry.state.done & ~jnp.isfinite(logprobs)
  state, emit = budget.advance(
      tables, rows.budgets, carry.state, token, was_forced)
  state = budget.end(state, failed, budget_state.FAILED)
  emit = dataclasses.replace(
      emit, provenance=jnp.where(failed, budget_state.NONE, emit.provenance),
      dropped=jnp.where(failed, 0, emit.dropped))
  record = {
      "token": emit.token, "provenance": emit.provenance,
      "logprob": jnp.where(emit.keep, logprobs, 0.0), "dropped": emit.dropped,
      "raw": jnp.where(was_forced | carry.state.done, -1, drawn),
      **_more(recorded, state, emit, distribution, logits)}
  if state.running is not None:
    state, measured = _measured(state, state.running, emit, logits)
    record |= measured
  processor_state = carry.processor_state
  if logits_processor is not None:
    processor_state = logits_processor.observe(processor_state, emit)
  return dataclasses.replace(
      carry, state=state, processor_state=processor_state), record


def _draw(
    logits: jax.Array, was_forced: jax.Array, banned: jax.Array | None,
    carry: Carry, rows: Rows, tables: budget.BudgetTables,
    logits_processor: logits_processors.LogitsProcessor | None,
) -> tuple[jax.Array, jax.Array]:
  """Draws a token for each row, also where one is forced: [B] and [B, V].

  Args:
    logits: [B, V] float32, the model's.
    was_forced: [B] bool, rows that a token is forced in.
    banned: [B, V] bool or None, bans of the budget; none where one is forced.
    carry, rows, tables, logits_processor: see `decode`.

  Returns:
    The tokens, and the distribution, see `token_sampling.draw`.
  """
  shaped, params, column = logits, rows.params, was_forced[:, None]
  if logits_processor is not None:
    shaped = logits_processor.process(carry.processor_state, logits)
  if rows.banned_ids is not None:
    ids = jnp.arange(tables.vocab_size)
    own = ~column & jnp.any(rows.banned_ids[:, :, None] == ids, axis=1)
    banned = own if banned is None else banned | own
  if tables.used:
    # The logprob of a forced token is the model's own: logits processor and
    # parameters are undone in its row, and nothing is banned there.
    free = lambda value, x: jnp.where(was_forced, value, x)
    if logits_processor is not None:
      shaped = jnp.where(column, logits, shaped)
    params = token_sampling.RowParams(
        temperature=free(1.0, params.temperature),
        top_k=free(0, params.top_k), top_p=free(1.0, params.top_p),
        min_p=free(0.0, params.min_p))
  # Folded by the count of draws, not by the position: behind a retraction the
  # position comes again, and must not repeat its noise.
  return token_sampling.draw(
      shaped, banned,
      token_sampling.fold_position(rows.keys, carry.state.draws), params)


def _more(
    recorded: Recorded, state: budget.BudgetState, emit: budget.Emit,
    distribution: jax.Array, logits: jax.Array,
) -> dict[str, jax.Array]:
  """Returns the part of a step's record that `recorded` asks for."""
  record = {}
  if recorded.counts:
    record["counts"] = jnp.stack([
        state.thinking, state.answer, state.wait_count, state.think_end,
        state.steps], 1)
  if recorded.model_logprobs:
    own = token_sampling.logprob_of(jax.nn.log_softmax(logits), emit.token)
    record["model_logprob"] = jnp.where(emit.keep, own, 0.0)
  if recorded.top_logprobs:
    record["top_logprobs"], record["top_tokens"] = jax.lax.top_k(
        distribution, recorded.top_logprobs)
  return record


def _measured(
    state: budget.BudgetState, running: confidence.Running, emit: budget.Emit,
    logits: jax.Array,
) -> tuple[budget.BudgetState, dict[str, jax.Array]]:
  """Updates the running entropy and confidence, and records the step's."""
  entropy, sureness = confidence.measure(logits, running.settings.top_k)
  running = confidence.update(
      running, entropy, sureness, emit.provenance == budget_state.SAMPLED,
      emit.dropped)
  return dataclasses.replace(state, running=running), {
      "entropy": jnp.where(emit.keep, entropy, 0.0),
      "confidence": jnp.where(emit.keep, sureness, 0.0)}


def _feed(
    model: Transformer, blocks: list[Block], carry: Carry, rows: Rows,
) -> tuple[Carry, jax.Array | None]:
  """Runs the model on each row's last token, at its own position.

  Returns:
    The carry with the next hidden states, and the experts [B, L, k] that the
    token was routed to, from 1; 0 in rows that feed nothing. None without
    experts.
  """
  state = carry.state
  position = jnp.where(
      state.done, -1, rows.prompt_lengths + state.num_tokens - 1)
  # Slots with positions at or behind it hold tokens that were retracted, and
  # the very token that is fed again then. A done row has position -1: it sees
  # nothing, writes holes, and what it holds stays, for the prefix cache.
  cache = kv.retract(carry.cache, jnp.where(
      state.done, carry.cache.slots, position))
  hidden, cache, experts = model.decode(state.last, position, cache, blocks)
  if experts is not None:
    experts = jnp.where(state.done[:, None, None], 0, experts + 1)
  return dataclasses.replace(carry, cache=cache, hidden=hidden), experts


def experts_dtype(config: ModelConfig) -> Any:
  """Returns the dtype for experts' numbers from 1 to E, and 0 for none."""
  return jnp.uint8 if config.num_experts < 256 else jnp.uint16
