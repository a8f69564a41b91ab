"""Requests and completions of an engine, their validation, and its settings.

  n: tokens of a completion  L: layers  k: experts per token, or top logprobs
  B: sequences that decode together  S: cache slots of each  N: steps of a chunk
"""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from posttrain.sampler import budget, decode, logits_processors, token_sampling
from posttrain.sampler.budget_tables import BudgetTables
from posttrain.sampler.confidence import Confidence
from posttrain.text import budget_rules
from posttrain.text.symbols import SymbolTable

PLAIN = token_sampling.SamplingParams()
# A TPU keeps bfloat16 in tiles of 16 slots, and int8 in tiles of 32. Where the
# last tile is not whole, the compiler makes a second copy of the cache for each
# chunk, which doubles its memory.
TILE = 32


@dataclasses.dataclass(frozen=True)
class Request:
  """Request for one completion.

  The seed and the ids alone decide which random bits it draws with.

  Attributes:
    prompt: token ids; of a continuation those behind its parent's.
    max_tokens: the most tokens of the completion, forced ones included.
    params: temperature and truncation.
    max_thinking_tokens, min_thinking_tokens, num_waits, truncate,
      max_thinking_steps: its budget, see `budget_state.Budgets`.
    wait_order: indices of the wait texts that its waits take, in turn; () for
      all of them.
    suppress: words of reflection are not sampled while it thinks.
    stop_ids: token ids that end it, besides the tokenizer's.
    stop_strings: strings that end it with the token that completes one.
    include_stop: what goes on from its end goes on behind the stop string
      that ended it, and not before it. (The tokens of the completion have the
      string in either case.)
    banned_ids: token ids that are never sampled.
    seed, stage, step, prompt_id, sample_id: see `token_sampling.row_keys`.
    logits_processor_args: the argument of the engine's logits processor.
    script: [steps] int32, choices to replay (`Completion.raw`); -1 draws.
    in_thinking: the prompt ends within a thinking section. None: it does if its
      end opens one, or, if a continuation has no tokens of its own, if its
      parent ended in one.
    keep: requests may go on from its end, and its keys and values go into the
      prefix cache.
    parent: number of the request that it goes on from (a continuation), which
      has ended and was kept; see `continuations`.
    first_draw: draws that were taken before it: its noise begins behind them.
  """

  prompt: tuple[int, ...]
  max_tokens: int
  params: token_sampling.SamplingParams = PLAIN
  max_thinking_tokens: int = -1
  min_thinking_tokens: int = 0
  num_waits: int = 0
  truncate: bool = False
  max_thinking_steps: int = -1
  wait_order: tuple[int, ...] = ()
  suppress: bool = False
  stop_ids: tuple[int, ...] = ()
  stop_strings: tuple[str, ...] = ()
  include_stop: bool = False
  banned_ids: tuple[int, ...] = ()
  seed: int = 0
  stage: str = "engine"
  step: int = 0
  prompt_id: int = 0
  sample_id: int = 0
  logits_processor_args: Any = None
  script: np.ndarray | None = None
  in_thinking: bool | None = None
  keep: bool = False
  parent: int | None = None
  first_draw: int = 0


@dataclasses.dataclass(frozen=True)
class Completion:
  """Completion of a request, as NumPy arrays.

  Attributes:
    id: what `submit` returned.
    request: the request. The prompt of a continuation has the tokens of its
      parent too, so that it can be asked for again without one.
    tokens: [n] token ids behind the prompt, a stop id included.
    logprobs: [n] float32, see `Rollouts.logprobs`.
    provenance: [n] int8, 1 sampled, 2 forced.
    finish_reason: "eos", "budget", "length", "stop", "abort" or "error".
    error: why the request could not run or go on; "" if nothing is wrong.
    think_end: "open", "natural" or "budget".
    think_length, think_steps, answer_length, wait_count: counts, see
      `BudgetState`.
    surplus: tokens that were drawn behind a stop string and cut off.
    draws: `first_draw`, and the steps up to its last token.
    kept: the sequence that a continuation goes on from, prompt included; None
      if the request never ran, or a vocabulary cannot spell the text before
      the stop string.
    kept_in_thinking: `kept` ends within a thinking section.
    model_logprobs: [n] float32, of the tokens under the model alone; None if
      the engine does not record them.
    top_tokens, top_logprobs: [n, k] int32 and float32, the likeliest tokens
      at each step, of the distribution that was sampled from; None if the
      engine does not record them.
    experts: [n, L, k] uint8 or uint16, see `Rollouts.experts`; None without
      experts.
    entropy, confidence: [n] float32, see `Rollouts.entropy`; None where they
      are off.
    raw: [steps] int32, every choice, see `Rollouts.raw`.
  """

  id: int
  request: Request
  tokens: list[int]
  logprobs: np.ndarray
  provenance: np.ndarray
  finish_reason: str
  error: str = ""
  think_end: str = "open"
  think_length: int = 0
  think_steps: int = 0
  answer_length: int = 0
  wait_count: int = 0
  surplus: int = 0
  draws: int = 0
  kept: tuple[int, ...] | None = None
  kept_in_thinking: bool = False
  model_logprobs: np.ndarray | None = None
  top_tokens: np.ndarray | None = None
  top_logprobs: np.ndarray | None = None
  experts: np.ndarray | None = None
  entropy: np.ndarray | None = None
  confidence: np.ndarray | None = None
  raw: np.ndarray = dataclasses.field(
      default_factory=lambda: np.zeros(0, np.int32))

  @classmethod
  def nothing(
      cls, number: int, request: Request, reason: str, error: str = "",
  ) -> "Completion":
    """Makes the completion of a request that never ran."""
    return cls(number, request, [], np.zeros(0, np.float32),
               np.zeros(0, np.int8), reason, error, draws=request.first_draw)


def drawn_waits(request: Request, count: int, texts: int) -> tuple[int, ...]:
  """Draws a `wait_order` of `count` from `texts` wait texts, by the ids."""
  # As 32 bits, which is how `token_sampling.row_keys` takes an id below 0.
  ids = (request.step, request.prompt_id, request.sample_id)
  rng = np.random.default_rng([
      request.seed, token_sampling.stage_number(request.stage),
      *(number % 2**32 for number in ids)])
  return tuple(rng.integers(0, texts, count).tolist())


def most_slots(request: Request, tables: BudgetTables) -> int:
  """Returns the most cache slots that the request can come to use.

  These are its prompt, its `max_tokens`, and the slots of delimiters that are
  retracted: a slot is not written again. A delimiter of n tokens costs n slots,
  as its last token is never fed, but the token before it is fed again.
  """
  wait, end = tables.retracted
  return (len(request.prompt) + request.max_tokens
          + request.num_waits * wait + end)


def problem(
    request: Request, tables: BudgetTables, settings: "Settings", *,
    symbols: SymbolTable | None,
) -> str:
  """Validates a request; returns why it cannot run, or "".

  Args:
    request: the request.
    tables: token ids of its tokenizer.
    settings: of the engine.
    symbols: of its tokenizer, to find stop strings.
  """
  r, size = request, tables.vocab_size
  if not isinstance(r.prompt, tuple):
    return f"The prompt is a {type(r.prompt).__name__}, and must be a tuple."
  for name, value in (vars(r) | vars(r.params)).items():
    if isinstance(value, (int, np.integer)) and name != "seed" and (
        not -2**31 <= value < 2**31):
      return f"{name} is {value} and must lie in -2**31 to 2**31 - 1."
  if not r.prompt:
    return "The prompt has no tokens."
  if not 0 <= r.seed < 2**32:
    return f"seed is {r.seed} and must lie in 0 to 2**32 - 1."
  ids = (*r.prompt, *r.stop_ids, *r.banned_ids)
  if min(ids) < 0 or max(ids) >= size:
    return (f"A token id lies outside of 0 to {size - 1}. Is it of another "
            "tokenizer?")
  if r.max_tokens < 1:
    return f"max_tokens is {r.max_tokens} and must be 1 or more."
  if not 0 <= r.first_draw < 2**30:
    return f"first_draw is {r.first_draw} and must lie in 0 to 2**30 - 1."
  if r.keep and not settings.prefix_cache_tokens:
    return ("keep is set, and the engine has no prefix cache. Raise its "
            "prefix_cache_tokens.")
  needed = most_slots(r, tables)
  if needed > settings.max_seq_len:
    return (f"A prompt of {len(r.prompt)} tokens and a completion of up to "
            f"{needed - len(r.prompt)} need {needed} slots, and the cache has "
            f"{settings.max_seq_len}. Shorten them or raise max_seq_len.")
  for name, limit in (("stop_ids", "max_ids"), ("banned_ids", "max_ids"),
                      ("wait_order", "max_waits")):
    found, most = len(getattr(r, name)), getattr(settings, limit)
    if found > most:
      return (f"{name} has {found} ids, and the engine was made for {most}. "
              f"Raise its {limit}.")
  if not all(0 <= i < tables.wait_texts for i in r.wait_order):
    return (f"wait_order={r.wait_order} names wait texts, of which there are "
            f"{tables.wait_texts}, from 0.")
  if r.suppress and tables.reflections is None:
    return "suppress is set, and no words of reflection were given."
  if len(set(r.banned_ids)) >= size:
    return "Every token is banned."
  if not all(r.stop_strings):
    return "A stop string is empty, and would stop before the first token."
  if r.stop_strings and symbols is None:
    return "The engine has no tokenizer to find stop strings with."
  for string in r.stop_strings:
    if symbols and not symbols.parse(string):
      return (f"The stop string {string!r} has words that are not in the "
              "vocabulary, or none.")
  return _hook_problem(r, size, settings) or budget_problem(r, tables)


def _hook_problem(r: Request, size: int, settings: "Settings") -> str:
  """Validates a script, and the argument of the logits processor."""
  if r.script is not None:
    script = np.asarray(r.script)
    if script.ndim != 1 or script.dtype.kind not in "iu" or (
        script.size and not -1 <= script.min() <= script.max() < size):
      return (f"script has shape {script.shape} and type {script.dtype}, and "
              f"must be [steps] of token ids below {size}, or -1 to draw.")
  processor = settings.logits_processor
  if processor and r.logits_processor_args is not None:
    try:  # It is a user's function: it may raise anything.
      processor.init(r.prompt, r.logits_processor_args)
    except Exception as error:
      return ("The logits processor refuses logits_processor_args="
              f"{r.logits_processor_args!r}: {type(error).__name__}: {error}")
  return ""


def budget_problem(limits: Any, tables: BudgetTables) -> str:
  """Validates a budget; returns its contradiction, or "".

  Args:
    limits: a request, or anything with the fields of its budget.
    tables: the thinking strings as token ids.
  """
  fields = {name: getattr(limits, name) for name in (
      "max_thinking_tokens", "min_thinking_tokens", "num_waits",
      "max_thinking_steps")}
  for contradiction in budget_rules.problems(
      fields, end=tables.used, step=tables.ids.strings.step):
    return contradiction
  maximum = limits.max_thinking_tokens
  ids = tables.ids
  closing = sum(map(len, (ids.newline, ids.end, ids.final_answer)))
  if maximum >= 0 and not limits.truncate and (
      maximum + closing + 1 > limits.max_tokens):
    return (
        f"rollout.max_tokens={limits.max_tokens} leaves no room for an answer: "
        f"{maximum} thinking tokens and {closing} to close them need at least "
        f"{maximum + closing + 1}.")
  return ""


def columns(
    requests: Sequence[Request | None], tables: BudgetTables,
    settings: "Settings",
) -> tuple[
    budget.Budgets, token_sampling.RowParams, Any, dict[str, np.ndarray]]:
  """Makes the columns of the rows: budgets, parameters, bans and key parts.

  A column that no request of this engine can fill is None, and is then no part
  of the programs.

  Args:
    requests: [B]; None is an idle row, whose values are never used.
    tables: token ids of their tokenizer.
    settings: K is `max_ids` or `max_waits`, to which lists of ids are padded
      with -1.

  Returns:
    `Budgets`, `RowParams`, banned ids [B, K] int32, and the arguments of
    `token_sampling.row_keys`, all NumPy.
  """
  idle = Request(prompt=(0,), max_tokens=1)
  rows = [request or idle for request in requests]

  def column(name: str, dtype: type = np.int32, used: bool = True) -> Any:
    return np.array([getattr(r, name) for r in rows], dtype) if used else None

  def padded(name: str, most: int) -> Any:
    ids = [getattr(r, name) for r in rows]
    return np.array(
        [(*i, *(-1,) * (most - len(i))) for i in ids], np.int32
    ) if most else None

  budgets = budget.Budgets(
      max_thinking_tokens=column("max_thinking_tokens"),
      min_thinking_tokens=column("min_thinking_tokens"),
      num_waits=column("num_waits"), max_tokens=column("max_tokens"),
      truncate=column("truncate", bool),
      stop_ids=padded("stop_ids", settings.max_ids),
      wait_order=padded("wait_order", settings.max_waits),
      suppress=column("suppress", bool, tables.reflections is not None),
      max_thinking_steps=column(
          "max_thinking_steps", used=bool(tables.ids.strings.step)))
  keys = {
      "seed": column("seed", np.uint32), "step": column("step"),
      "stage": np.array(
          [token_sampling.stage_number(r.stage) for r in rows], np.uint32),
      "prompt_id": column("prompt_id"), "sample_id": column("sample_id")}
  return (budgets, token_sampling.RowParams.of([r.params for r in rows]),
          padded("banned_ids", settings.max_ids), keys)


@dataclasses.dataclass(frozen=True)
class Settings:
  """Settings of continuous batching; any change of them compiles anew.

  Attributes:
    max_num_seqs: B, sequences that decode together at most.
    max_seq_len: S at most, in tokens: prompt and completion of the longest
      request.
    min_seq_len: S to begin with; it grows, up to `max_seq_len`, when a
      sequence needs more, see `sizes`.
    chunk: N, decode steps before the host syncs, at most.
    admit_fraction: the host syncs before a chunk's end when this share of
      `max_num_seqs` is free for requests that wait.
    prefill_rows: prompts prefilled together. More than one helps where a
      chunk of one prompt does not fill the chip; it costs where a prompt
      comes alone.
    prefill_chunk: tokens of a prompt in one forward pass (chunked prefill).
    prefix_cache_tokens: slots of the prefix cache, for sequences besides what
      the next request goes on from. On a mesh a row takes its slots once for
      each part that rows are split over.
    max_ids: the most stop ids and banned ids that a request may have, of each.
    max_waits: the most entries of `wait_order` that a request may have.
    cache_dtype, weights_dtype: dtype of the KV cache, and of the decode
      loop's matrices: "compute", or "int8" with scales.
    recorded: what a completion holds besides tokens and logprobs.
    logits_processor: changes the logits of every step.
    budget_schedule: changes the budgets of every step.
    confidence: keeps each row's running entropy and confidence; None for
      neither.
  """

  max_num_seqs: int
  max_seq_len: int
  min_seq_len: int = 64
  chunk: int = 32
  admit_fraction: float = 0.125
  prefill_rows: int = 1
  prefill_chunk: int = 64
  prefix_cache_tokens: int = 0
  max_ids: int = 4
  max_waits: int = 4
  cache_dtype: str = "compute"
  weights_dtype: str = "compute"
  recorded: decode.Recorded = decode.PLAIN
  logits_processor: logits_processors.LogitsProcessor | None = None
  budget_schedule: decode.BudgetSchedule | None = None
  confidence: Confidence | None = None

  @property
  def rows(self) -> int:
    """Rows of the device arrays: B, and at least 2."""
    # jax 0.11 drops the sharding of an array of one element. The second row
    # is then never given a request.
    return max(2, self.max_num_seqs)

  @property
  def sizes(self) -> list[int]:
    """Sizes that S takes, in whole tiles, the last for the longest request.

    What is left of S besides a first part, of `min_seq_len` - `chunk`, doubles:
    with a prompt in that part, attention reads few slots in vain. Each size is
    a quarter larger at least, as it is a program more.
    """
    tiled = lambda slots: -(-slots // TILE) * TILE
    # A row that has ended is kept whole until its chunk is over.
    last = tiled(self.max_seq_len + (
        self.chunk if self.prefix_cache_tokens else 0))
    sizes, rest = [min(tiled(self.min_seq_len), last)], self.chunk
    while sizes[-1] < last:
      rest *= 2
      size = min(tiled(self.min_seq_len - self.chunk + rest), last)
      if size == last or 4 * size >= 5 * sizes[-1]:
        sizes.append(size)
    return sizes

  def prefill_sizes(self, length: int) -> list[int]:
    """Sizes of caches that sequences of up to `length` tokens are prefilled in.

    They are doublings of `prefill_chunk`. With a prefix cache there is room for
    a chunk more, which a continuation may reach into with its last chunk.
    """
    room = self.prefill_chunk if self.prefix_cache_tokens else 0
    return [size + room for size in doublings(self.prefill_chunk, length)]


def fitting(sizes: Sequence[int], size: int, needed: int) -> Iterator[int]:
  """Yields the sizes to resize through, from `size`, to hold `needed` slots.

  Args:
    sizes: all sizes, ascending.
    size: the present one.
    needed: slots that the longest active sequence needs for its next chunk.
  """
  at = sizes.index(size)
  while sizes[at] < needed:
    at += 1
    yield sizes[at]
  # It shrinks at a quarter, not at a half: between the two a ring would grow
  # and shrink by turns, and a resize copies the whole cache.
  while at and needed <= sizes[at] // 4:
    at -= 1
    yield sizes[at]


def doublings(first: int, last: int) -> list[int]:
  """Lists `first` and its doublings, up to the first that reaches `last`."""
  sizes = [first]
  while sizes[-1] < last:
    sizes.append(sizes[-1] * 2)
  return sizes
