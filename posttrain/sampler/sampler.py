"""Sampler: prompts in, `Rollouts` out, by static or continuous batching.

Static batching decodes all rows of a call together, until the longest ends.
Continuous batching (`Sampler.max_num_seqs` above 0) sends them through an
`Engine`, which gives a row to the next request as soon as it is free.

Tokens in, tokens out: text is for people and rewards. The host syncs once per
chunk of decode steps, never per token, and the chunk's size changes no token.
Shapes come from the settings and the number of rows alone, so a stage compiles
one prefill program, and one decode program per size of the KV cache.

  P: prompts  G: samples per prompt, group_size  B: rows, P * G
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from posttrain import sharding
from posttrain.model.transformer import Transformer
from posttrain.sampler import (
  active_sequence,
  budget,
  budget_state,
  decode,
  engine,
  requests,
  rollouts,
  sampling_options,
  token_sampling,
)
from posttrain.text import thinking as thinking_lib

PREFILL_CHUNK = 256  # Tokens in one forward pass, in continuous batching.


@dataclasses.dataclass(frozen=True)
class Limits:
  """Budgets of a call, one value for all rows or one per row ([B]).

  Attributes:
    max_tokens: the most tokens of a completion, forced ones included.
    max_thinking_tokens: -1 for no maximum.
    min_thinking_tokens: no delimiter or stop token is sampled before.
    num_waits: how many delimiters are replaced by the wait text.
    truncate: end the row at the maximum instead of closing the thinking.
    max_thinking_steps: -1 for no maximum.
  """

  max_tokens: int | np.ndarray
  max_thinking_tokens: int | np.ndarray = -1
  min_thinking_tokens: int | np.ndarray = 0
  num_waits: int | np.ndarray = 0
  truncate: bool | np.ndarray = False
  max_thinking_steps: int | np.ndarray = -1


@dataclasses.dataclass(frozen=True)
class Sampler:
  """Sampler with a tokenizer's strings, a distribution and shapes.

  Attributes:
    ids: the thinking strings as token ids.
    tables: the same, as budget forcing reads them.
    params: temperature and truncation.
    max_prompt_tokens: cache slots for a prompt (T); a longer one is an error.
    chunk: decode steps before the host syncs.
    max_num_seqs: sequences that an engine decodes together (continuous
      batching); 0: all rows of a call decode together (static batching).
    cache_dtype, weights_dtype: dtype of the KV cache, and of the decode
      loop's matrices: "compute", or "int8" with scales.
    options: logits processor, budget schedule and the like, of all calls.
    before_chunk: is called before each chunk, on every host alike. If it
      raises, the call ends, and all that was drawn in it is dropped.
  """

  ids: thinking_lib.ThinkingIds
  tables: budget.BudgetTables
  params: token_sampling.SamplingParams
  max_prompt_tokens: int
  chunk: int = 32
  max_num_seqs: int = 0
  cache_dtype: str = "compute"
  weights_dtype: str = "compute"
  options: sampling_options.SamplingOptions = sampling_options.NONE
  before_chunk: Callable[[], None] = engine.nothing

  def generate(
      self, model: Transformer, prompts: Sequence[Sequence[int]],
      limits: Limits, *, prompt_id: Sequence[int], group_size: int = 1,
      seed: int, stage: str, step: int = 0, first_sample: int | np.ndarray = 0,
      script: np.ndarray | None = None,
      on_chunk: Callable[[rollouts.Recorder, np.ndarray], np.ndarray | None]
      | None = None,
  ) -> rollouts.Rollouts:
    """Samples `group_size` completions of every prompt.

    Args:
      model: on the current mesh.
      prompts: token ids, [P] ragged, each of 1 to `max_prompt_tokens`.
      limits: budgets; per-row arrays are [P * group_size], prompt by prompt.
      prompt_id: [P]; a token's random bits depend on it, on the seed, stage,
        step and sample id, on the token's position, and on nothing else.
      group_size: G.
      seed, stage, step: see `token_sampling.row_keys`.
      first_sample: sample ids of a prompt are first_sample ..
        first_sample + G - 1; one number, or one per prompt ([P]), so that a
        prompt that stands there twice has other draws.
      script: [B, steps] choices to replay (`Rollouts.raw`).
      on_chunk: is called after each chunk with the record so far and [B] bool
        of the rows that are done. It may return [B] bool of rows to stop,
        whose finish reason is then "stop"; it may cut them in the record.

    Returns:
      Rows in order of prompt, then sample.

    Raises:
      ValueError: an empty or too long prompt, an unknown id, budgets that
        contradict each other, logits that are not finite.
    """
    rows = len(prompts) * group_size
    asked = self.make_requests(
        prompts, limits, prompt_id=prompt_id, group_size=group_size,
        first_sample=first_sample, seed=seed, stage=stage, step=step)
    if self.max_num_seqs:
      if on_chunk:
        raise ValueError(
            "on_chunk sees all rows at once, and with max_num_seqs="
            f"{self.max_num_seqs} they come and go. Use an Engine.")
      return self._continuous(model, asked if script is None else [
          dataclasses.replace(request, script=row)
          for request, row in zip(asked, script, strict=True)])
    device = self.inputs(asked, group_size=group_size)
    device["rows"] = self.rows(device, row_keys(
        seed=np.uint32(seed), stage=stage, step=step,
        prompt_id=device["prompt_id"], sample_id=device["sample_id"]))
    recorder, state = self._static(
        model, device, rows, group_size, script, on_chunk)
    take = lambda x: np.asarray(x)[:rows]
    return rollouts.Rollouts(
        prompts=[list(p) for p in prompts for _ in range(group_size)],
        finish_reason=take(state.finish_reason).astype(np.int8),
        think_end=take(state.think_end).astype(np.int8),
        think_lengths=take(state.thinking), think_steps=take(state.steps),
        answer_lengths=take(state.answer), wait_count=take(state.wait_count),
        prompt_id=np.repeat(
            np.asarray(prompt_id, np.int32), group_size),
        sample_id=np.array([request.sample_id for request in asked], np.int32),
        **recorder.padded())

  @property
  def first_slots(self) -> int:
    """Cache slots that static batching begins with: prompt and one chunk."""
    return self.max_prompt_tokens + self.chunk

  def next_slots(self, slots: int) -> int:
    """Returns the next size of the cache: the completion's part doubles."""
    # Doublings bound the number of compiled programs, and the share of empty
    # slots that attention reads.
    return 2 * slots - self.max_prompt_tokens

  def engine_settings(
      self, asked: Sequence[requests.Request]) -> engine.Settings:
    """Returns the settings of an engine for these requests.

    `max_num_seqs` is rounded up to what the current mesh divides.
    """
    parts = sharding.axis_size("rows")
    # As if each request had the longest prompt, so that a later call with
    # other prompts has the same shapes and compiles nothing.
    most = self.max_prompt_tokens + max(
        requests.most_slots(r, self.tables) - len(r.prompt) for r in asked)
    return engine.Settings(
        max_num_seqs=-(-self.max_num_seqs // parts) * parts, max_seq_len=most,
        min_seq_len=self.max_prompt_tokens + self.chunk, chunk=self.chunk,
        prefill_chunk=min(self.max_prompt_tokens, PREFILL_CHUNK),
        cache_dtype=self.cache_dtype, weights_dtype=self.weights_dtype,
        max_ids=max(engine.Settings.max_ids, *(
            len(request.wait_order) for request in asked)),
        logits_processor=self.options.logits_processor,
        budget_schedule=self.options.budget_schedule)

  def _continuous(
      self, model: Transformer, asked: list[requests.Request],
  ) -> rollouts.Rollouts:
    """Samples by continuous batching, through an engine."""
    queue = engine.Engine(
        model, self.tables, self.engine_settings(asked),
        before_chunk=self.before_chunk)
    numbers = [queue.submit(request) for request in asked]
    done = {found.id: found for found in queue.results()}
    failed = [found.error for found in done.values() if found.error]
    if failed:
      raise ValueError(f"{len(failed)} of {len(asked)} rows: {failed[0]}")
    return rollouts.of_completions([done[number] for number in numbers])

  def _static(self, model, device, rows, group_size, script, on_chunk):
    """Samples by static batching: prefill, then chunks until all are done.

    Args:
      device: of `inputs`, with "rows".
      rows: B, without padding.

    Returns:
      The record of the B rows, and the final `BudgetState`, fetched.
    """
    slots = self.first_slots
    carry = decode.prefill(
        model, device["tokens"], device["segment_ids"],
        device["in_thinking"], device["done"], self.tables,
        device["budgets"], group_size=group_size, slots=slots,
        cache_dtype=self.cache_dtype)
    carry = dataclasses.replace(
        carry, processor_state=device["processor_state"])
    model, blocks = decode.unstacked(
        model, weights_dtype=self.weights_dtype)
    recorder, used = rollouts.Recorder(rows), self.max_prompt_tokens
    total = device["done"].shape[0]
    while True:
      self.before_chunk()
      # Static batching never wraps the ring: it grows before it is full.
      if used + self.chunk > slots:
        slots = self.next_slots(slots)
        carry = decode.resize(carry, slots=slots)
      # Steps so far, of all rows alike: where the script goes on.
      begin = used - self.max_prompt_tokens
      carry, record = decode.decode(
          model, blocks, carry, device["rows"],
          script_window(script, total, begin, self.chunk), np.int32(total),
          self.tables, steps=self.chunk,
          logits_processor=self.options.logits_processor,
          budget_schedule=self.options.budget_schedule)
      record, done, state = sharding.fetch(
          (record, carry.state.done, carry.state))
      recorder.add(record)
      used += self.chunk
      stopped = on_chunk(recorder, done[:rows]) if on_chunk else None
      if stopped is not None and stopped.any():
        stopped = np.pad(stopped, (0, total - rows))
        stopped_state = budget.stop(
            carry.state, sharding.put(stopped, "rows"))
        carry = dataclasses.replace(carry, state=stopped_state)
        state = sharding.fetch(stopped_state)
      if state.done.all():  # Padding rows are done from the start.
        _check_numbers(state)
        return recorder, state

  def make_requests(
      self, prompts: Sequence[Sequence[int]], limits: Limits, *,
      prompt_id: Sequence[int], group_size: int = 1,
      first_sample: int | np.ndarray = 0,
      seed: int = 0, stage: str = "", step: int = 0,
  ) -> list[requests.Request]:
    """Makes a request for each completion, in order of prompt, then sample.

    Arguments are those of `generate`.

    Raises:
      ValueError: an empty or too long prompt, an unknown id, budgets that
        contradict each other.
    """
    self._check(prompts)
    rows = len(prompts) * group_size
    first = np.broadcast_to(first_sample, len(prompts)).tolist()
    names = [field.name for field in dataclasses.fields(Limits)]
    columns = [np.broadcast_to(getattr(limits, name), (rows,)).tolist()
               for name in names]
    asked = []
    for row, values in enumerate(zip(*columns, strict=True)):
      request = requests.Request(
          prompt=tuple(prompts[row // group_size]), params=self.params,
          **dict(zip(names, values, strict=True)), seed=int(np.uint32(seed)),
          stage=stage, step=step, prompt_id=int(prompt_id[row // group_size]),
          sample_id=first[row // group_size] + row % group_size)
      problem = requests.budget_problem(request, self.tables)
      if problem:
        raise ValueError(problem)
      asked.append(self.options.apply(request, len(self.tables.waits)))
    return asked

  def _check(self, prompts: Sequence[Sequence[int]]) -> None:
    """Raises ValueError for a prompt's length or an unknown token id."""
    for i, prompt in enumerate(prompts):
      if not 1 <= len(prompt) <= self.max_prompt_tokens:
        raise ValueError(
            f"Prompt {i} has {len(prompt)} tokens, and rollout."
            f"max_prompt_tokens allows 1 to {self.max_prompt_tokens}.")
      if min(prompt) < 0 or max(prompt) >= self.tables.vocab_size:
        raise ValueError(
            f"Prompt {i} has a token id outside of 0 to "
            f"{self.tables.vocab_size - 1}. Is it of another tokenizer?")

  def inputs(
      self, asked: Sequence[requests.Request], *, group_size: int,
      put: Callable[..., Any] = sharding.put,
  ) -> dict[str, Any]:
    """Makes the device arrays of static batching, padded for the mesh.

    Args:
      asked: of `make_requests`.
      group_size: G.
      put: makes a device array of a NumPy array and its logical axes;
        `sharding.abstract` gives shapes for a plan.

    Returns:
      Arrays by the names that `decode` has for them, and the ids that
      `row_keys` takes.
    """
    prompts = [request.prompt for request in asked[::group_size]]
    rows, width = len(asked), self.max_prompt_tokens
    # Whole prompts per part of the mesh, so that a prompt's cache is copied to
    # its samples without communication.
    parts = sharding.axis_size("rows")
    # And two rows at least: jax 0.11 drops the sharding of an array of one
    # element (`_get_sharding_for_varying_out_shape`).
    least = len(prompts) + (rows == 1)
    padded = -(-least // parts) * parts
    extra = padded - len(prompts)
    tokens = np.zeros((padded, width), np.int32)
    segment_ids = np.zeros((padded, width), np.int32)
    for row, prompt in enumerate(prompts):
      tokens[row, width - len(prompt):] = prompt
      segment_ids[row, width - len(prompt):] = 1
    lengths = np.repeat(segment_ids.sum(1, dtype=np.int32), group_size)
    thinks = [requests.in_thinking(prompt, self.tables) for prompt in prompts]
    extra *= group_size
    def by_row(values: Any, dtype: Any = np.int32) -> Any:
      values = np.asarray(values, dtype)
      rest = [(0, 0)] * (values.ndim - 1)
      return put(np.pad(values, ((0, extra), *rest)), "rows",
                 *(None for _ in rest))

    return {
        "tokens": put(tokens, "rows", "slots"),
        "segment_ids": put(segment_ids, "rows", "slots"),
        "in_thinking": by_row(np.repeat(thinks, group_size), bool),
        "done": put(lengths == 0, "rows"),
        "prompt_lengths": put(lengths, "rows"),
        "budgets": jax.tree.map(
            lambda x: by_row(x, x.dtype), self._budgets(asked)),
        "params": jax.tree.map(
            lambda x: put(x, "rows"),
            token_sampling.RowParams.of([self.params] * lengths.size)),
        "processor_state": self._processor_state(asked, extra, put),
        "prompt_id": by_row([request.prompt_id for request in asked]),
        "sample_id": by_row([request.sample_id for request in asked])}

  def _budgets(self, asked: Sequence[requests.Request]) -> budget.Budgets:
    """Makes the budgets, [B] each; unused ones are None.

    A budget that no row of this sampler can ask for is then no part of the
    program.
    """
    most = max(len(request.wait_order) for request in asked)
    budgets, *_ = requests.columns(asked, most)
    unused: dict[str, Any] = {"stop_ids": None}
    if not most:
      unused["wait_order"] = None
    if not self.options.suppress:
      unused["suppress"] = None
    if not self.tables.step:
      unused["max_thinking_steps"] = None
    return dataclasses.replace(budgets, **unused)

  def _processor_state(
      self, asked: Sequence[requests.Request], extra: int,
      put: Callable[..., Any],
  ) -> Any:
    """Makes the logits processor's state of all rows, padding included."""
    processor = self.options.logits_processor
    if processor is None:
      return None
    rows = [processor.init(request.prompt, request.logits_processor_args)
            for request in asked]
    rows += [processor.init((0,), None)] * extra
    return jax.tree.map(
        lambda *x: put(np.stack(x), "rows", *(None for _ in np.shape(x[0]))),
        *rows)

  def rows(self, inputs: dict[str, Any], keys: Any) -> decode.Rows:
    """Makes the `decode.Rows` of `inputs` and the keys of `row_keys`."""
    return decode.Rows(inputs["prompt_lengths"], keys, inputs["budgets"],
                       inputs["params"])


def script_window(
    script: np.ndarray | None, rows: int, begin: int, steps: int,
    put: Callable[..., Any] = sharding.put,
) -> Any:
  """Cuts a chunk from a script: [rows, steps] int32, -1 where it has none.

  Args:
    script: [B, n] int32, or None.
    rows: of the window; those behind B are padding.
    begin: the first column.
  """
  window = np.full((rows, steps), -1, np.int32)
  if script is not None:
    part = script[:, begin:begin + steps]
    window[:part.shape[0], :part.shape[1]] = part
  return put(window, "rows", "slots")


def _check_numbers(state: budget.BudgetState) -> None:
  """Raises ValueError where a row's logits were not finite."""
  failed = state.finish_reason == budget_state.FAILED
  if failed.any():
    raise ValueError(
        f"{failed.sum()} of {failed.size} rows: {active_sequence.NOT_FINITE}")


row_keys = jax.jit(token_sampling.row_keys, static_argnames=("stage",))
