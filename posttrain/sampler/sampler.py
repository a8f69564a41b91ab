"""Sampler: prompts in, `Rollouts` out, through an `Engine` of one call.

Up to `Sampler.max_num_seqs` sequences decode together, and the engine gives the
place of one that ends to the next (continuous batching). A call makes an engine
of its own, so nothing stays on the devices between two calls, and the weights
may change.

Tokens in, tokens out: text is for people and rewards. The host syncs once per
chunk of decode steps, never per token, and the chunk's size changes no token.
Shapes come from the settings, the limits and the number of rows, so another
call of a stage compiles nothing.

  P: prompts  G: samples per prompt, group_size  B: rows, P * G
"""

import dataclasses
import math
from collections.abc import Callable, Sequence

import numpy as np

from posttrain import sharding
from posttrain.model.transformer import Transformer
from posttrain.sampler import (
  budget,
  engine,
  requests,
  rollouts,
  sampling_options,
  token_sampling,
)
from posttrain.text.symbols import SymbolTable

# Tokens of a prompt in one forward pass at most (chunked prefill), and tokens
# of all prompts that a device prefills together: enough to fill a chip, and few
# enough that attention's scores stay small beside the weights.
PREFILL_CHUNK, PREFILL_TOKENS = 256, 512
MAX_IDS = 4  # Stop ids, and banned ids, that a turn of an episode may name.


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
    tables: the tokenizer's thinking strings, as budget forcing reads them.
    params: temperature and truncation.
    max_prompt_tokens: cache slots for a prompt (T); a longer one is an error.
    chunk: decode steps before the host syncs.
    max_num_seqs: sequences that decode together at most; 0: all rows of a
      call.
    cache_dtype, weights_dtype: dtype of the KV cache, and of the decode
      loop's matrices: "compute", or "int8" with scales.
    max_episode_tokens: tokens of an episode of several turns, behind its first
      prompt; 0: each request stands alone.
    prefix_cache_tokens: slots that the turns of episodes are kept in; 0: as
      many as the sequences that decode together may need.
    symbols: of the tokenizer, to find stop strings of turns.
    options: logits processor, budget schedule and the like, of all calls.
    before_chunk: is called before each chunk, on every host alike. If it
      raises, the call ends, and all that was drawn in it is dropped.
  """

  tables: budget.BudgetTables
  params: token_sampling.SamplingParams
  max_prompt_tokens: int
  chunk: int = 32
  max_num_seqs: int = 0
  cache_dtype: str = "compute"
  weights_dtype: str = "compute"
  max_episode_tokens: int = 0
  prefix_cache_tokens: int = 0
  symbols: SymbolTable | None = None
  options: sampling_options.SamplingOptions = sampling_options.NONE
  before_chunk: Callable[[], None] = engine.nothing

  def generate(
      self, model: Transformer, prompts: Sequence[Sequence[int]],
      limits: Limits, *, prompt_id: Sequence[int], group_size: int = 1,
      seed: int, stage: str, step: int = 0, first_sample: int | np.ndarray = 0,
      script: np.ndarray | None = None,
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

    Returns:
      Rows in order of prompt, then sample.

    Raises:
      ValueError: an empty or too long prompt, an unknown id, budgets that
        contradict each other, logits that are not finite.
    """
    asked = self.make_requests(
        prompts, limits, prompt_id=prompt_id, group_size=group_size,
        first_sample=first_sample, seed=seed, stage=stage, step=step)
    if script is not None:
      asked = [dataclasses.replace(request, script=row)
               for request, row in zip(asked, script, strict=True)]
    queue = self.make_engine(model, asked, group_size)
    numbers = [queue.submit(request) for request in asked]
    done = {found.id: found for found in queue.results()}
    failed = [found.error for found in done.values() if found.error]
    if failed:
      raise ValueError(f"{len(failed)} of {len(asked)} rows: {failed[0]}")
    return rollouts.of_completions([done[number] for number in numbers])

  def make_engine(
      self, model: Transformer, asked: Sequence[requests.Request],
      group_size: int = 1,
  ) -> engine.Engine:
    """Makes an engine for these requests, which are not submitted yet."""
    return engine.Engine(
        model, self.tables, self.engine_settings(asked, group_size),
        symbols=self.symbols, before_chunk=self.before_chunk)

  def engine_settings(
      self, asked: Sequence[requests.Request], group_size: int = 1,
  ) -> requests.Settings:
    """Returns the settings of an engine for these requests.

    The number of sequences is rounded up to what the current mesh divides.

    Args:
      asked: of `make_requests`.
      group_size: requests that have the same prompt.
    """
    parts = sharding.axis_size("rows")
    rows = min(self.max_num_seqs or len(asked), len(asked))
    # As if each request had the longest prompt, so that a later call with
    # other prompts has the same shapes and compiles nothing.
    most = self.max_prompt_tokens + max(
        requests.most_slots(r, self.tables) - len(r.prompt)
        + max(0, self.max_episode_tokens - r.max_tokens) for r in asked)
    # Chunks of equal lengths, so that the last one is not mostly padding.
    chunks = -(-self.max_prompt_tokens // PREFILL_CHUNK)
    settings = requests.Settings(
        max_num_seqs=-(-rows // parts) * parts, max_seq_len=most,
        min_seq_len=self.max_prompt_tokens + self.chunk, chunk=self.chunk,
        prefill_chunk=-(-self.max_prompt_tokens // chunks), max_ids=0,
        max_waits=max(len(request.wait_order) for request in asked),
        cache_dtype=self.cache_dtype, weights_dtype=self.weights_dtype,
        logits_processor=self.options.logits_processor,
        budget_schedule=self.options.budget_schedule,
        confidence=self.options.confidence)
    if self.max_episode_tokens:
      settings = self._with_turns(settings)
    # Where not all requests are admitted at once, later ones come as others
    # end, and a batch of prompts that is larger than these is padded.
    admitted = rows if rows == len(asked) else rows * settings.admit_fraction
    return dataclasses.replace(settings, prefill_rows=min(
        math.ceil(admitted / group_size),
        parts * (PREFILL_TOKENS // settings.prefill_chunk)))

  def _with_turns(self, settings: requests.Settings) -> requests.Settings:
    """Adds what turns need that go on from others, and end at strings."""
    return dataclasses.replace(
        settings, max_ids=MAX_IDS,
        recorded=dataclasses.replace(settings.recorded, counts=True),
        prefix_cache_tokens=self.prefix_cache_tokens
        or settings.max_num_seqs * settings.prefill_sizes(
            settings.max_seq_len)[-1])

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
      asked.append(self.options.apply(request, self.tables.wait_texts))
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
