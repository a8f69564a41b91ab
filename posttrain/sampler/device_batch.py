"""Device batch: the engine's arrays on the device, and the programs on them.

  B: rows of the batch, a sequence each  S: cache slots of each
  N: steps of a chunk
"""

import dataclasses
import functools
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from posttrain import sharding
from posttrain.model.block import Block
from posttrain.model.config import ModelConfig
from posttrain.model.transformer import Transformer
from posttrain.sampler import (
  budget,
  confidence,
  decode,
  prefill,
  requests,
  token_sampling,
)
from posttrain.sampler.requests import Request, Settings
from posttrain.sharding import shard, spec


class Programs:
  """Calls jitted functions, and counts the programs that are compiled.

  Attributes:
    seconds: of each program's first call, its compilation included, by key.
  """

  # It must not refer to the engine, whose arrays would then stay on the device
  # until Python looks for cycles.
  def __init__(self, log: Callable[[str], None], most: int):
    self.seconds: dict[tuple, float] = {}
    self._log, self._most = log, most

  def __call__(self, key: tuple, function: Callable, *args, **kwargs) -> Any:
    """Calls `function`.

    Args:
      key: the function's name and every size that it compiles anew for.
    """
    if key in self.seconds:
      return function(*args, **kwargs)
    started = time.monotonic()
    result = function(*args, **kwargs)
    self.seconds[key] = time.monotonic() - started
    self._log(f"compiled {' '.join(map(str, key))} in "
              f"{self.seconds[key]:.1f} s ({len(self.seconds)} of at most "
              f"{self._most})")
    return result


class DeviceBatch:
  """B rows that decode together; each has a sequence, or is idle.

  Attributes:
    tables: strings of budget forcing, on the device.
    settings: of the engine.
    carry: of the decode loop. Its buffers are donated to every program, so
      no older carry may be used.
  """

  def __init__(
      self, config: ModelConfig, tables: budget.BudgetTables,
      settings: Settings, run: Programs,
  ):
    """Makes a batch of idle rows, with the fewest cache slots of `settings`."""
    self.tables, self.settings, self._run = tables, settings, run
    self._rows: decode.Rows | None = None
    count, size = settings.rows, settings.sizes[0]
    rows = run(("empty", count, size), prefill.empty, config, np.int32(0),
               rows=count, slots=size, cache_dtype=settings.cache_dtype)
    budgets, *_ = requests.columns([None] * count, tables, settings)
    zeros = np.zeros(count, np.int32)
    self.carry = decode.Carry(
        rows.cache, rows.hidden,
        run(("done",), done, tables, budgets, zeros, settings.confidence),
        settings.logits_processor and jax.tree.map(
            lambda x: repeated(np.asarray(x), rows=count),
            settings.logits_processor.init((0,), None)))

  @property
  def rows(self) -> prefill.Rows:
    """KV cache and hidden states; they are donated to the next program."""
    return prefill.Rows(self.carry.cache, self.carry.hidden)

  @property
  def size(self) -> int:
    """Cache slots of each row (S)."""
    return self.carry.cache.slots

  def resize(self, size: int) -> None:
    """Changes S to `size`; what the rows hold is kept."""
    self.carry = self._run(
        ("resize", self.size, size), decode.resize, self.carry, slots=size)

  def begin(
      self, asked: Sequence[Request | None], admitted: Sequence[int],
      place: Callable[[prefill.Rows], prefill.Rows],
  ) -> None:
    """Begins new requests in some of the rows.

    Args:
      asked: [B], the request of every row; None is idle.
      admitted: rows whose request is new.
      place: copies their prompts into the cache.
    """
    # The cache is donated to `place`: the old carry must not be read after it.
    placed = place(self.rows)
    # The requests of all rows are sent again: they are small, and one program
    # then serves any number of new ones.
    self._rows, state = self._run(
        ("begin",), begin, self.carry.state, self.tables,
        *begin_arguments(asked, admitted, self.tables, self.settings))
    processor_state = self.carry.processor_state
    if self.settings.logits_processor is not None:
      # A processor's state may be large ([V] a row), so only new rows are sent.
      for row in admitted:
        request = asked[row]
        assert request is not None
        processor_state = self._run(
            ("logits_processor",), set_row, processor_state,
            self.settings.logits_processor.init(
                request.prompt, request.logits_processor_args), np.int32(row))
    self.carry = dataclasses.replace(
        self.carry, cache=placed.cache, hidden=placed.hidden, state=state,
        processor_state=processor_state)

  def decode(
      self, model: Transformer, blocks: list[Block], script: np.ndarray,
      until: int,
  ) -> tuple[dict[str, np.ndarray], Any]:
    """Runs a chunk of N decode steps, or until `until` rows are done.

    Args:
      model, blocks: as `decode.unstacked` makes them.
      script: [B, N] int32, choices to replay; -1 draws.
      until: rows that are done, idle ones included.

    Returns:
      The record of the steps and the `BudgetState` behind them, as NumPy.
    """
    assert self._rows is not None
    self.carry, record = self._run(
        ("decode", self.size), decode.decode, model, blocks, self.carry,
        self._rows, sharding.put(script, "rows", "slots"), np.int32(until),
        self.tables, steps=script.shape[1], recorded=self.settings.recorded,
        logits_processor=self.settings.logits_processor,
        budget_schedule=self.settings.budget_schedule)
    # The running values stay on the device: the record has each token's.
    return sharding.fetch(
        (record, dataclasses.replace(self.carry.state, running=None)))

  def end(self, rows: Sequence[bool], reason: int) -> None:
    """Ends rows for `reason`, a finish reason of `budget_state`.

    Rows that are done already keep their own reason.
    """
    state = self._run(
        ("end",), _end, self.carry.state, np.array(rows), np.int32(reason))
    self.carry = dataclasses.replace(self.carry, state=state)


def begin_arguments(
    asked: Sequence[Request | None], admitted: Sequence[int],
    tables: budget.BudgetTables, settings: Settings,
) -> tuple[Any, ...]:
  """Makes the NumPy arguments of `begin`, those behind the tables.

  `asked` and `admitted` are those of `DeviceBatch.begin`.
  """
  budgets, params, banned_ids, keys = requests.columns(asked, tables, settings)
  # An idle row has a prompt of one token, and is done: nothing reads it.
  idle = Request(prompt=(0,), max_tokens=1)
  rows = [request or idle for request in asked]
  lengths = np.array([len(r.prompt) for r in rows], np.int32)
  return (
      keys, (lengths, budgets, params, banned_ids),
      np.array([bool(r.in_thinking) for r in rows]),
      np.array([r.prompt[-1] for r in rows], np.int32),
      np.array([r.first_draw for r in rows], np.int32),
      np.isin(np.arange(len(asked)), admitted))


def _by_row(tree: Any) -> Any:
  """Lays out [B, ...] arrays by rows, as the carry is."""
  return jax.tree.map(
      lambda x: shard(
          jnp.asarray(x), "rows", *(None for _ in x.shape[1:])), tree)


@jax.jit
def begin(
    state, tables, keys, columns, in_thinking, last_tokens, draws, admitted,
):
  """Begins the admitted rows.

  Args:
    state: `BudgetState` of all rows.
    tables: token ids that budget forcing reads.
    keys, columns, in_thinking, last_tokens, draws, admitted:
      `begin_arguments`, of all rows; only `admitted` [B] bool are begun.

  Returns:
    `decode.Rows` of all rows, and the state, in which the admitted rows are
    at their beginning.
  """
  lengths, budgets, params, banned_ids = _by_row(columns)
  rows = decode.Rows(
      lengths, token_sampling.row_keys(**_by_row(keys)), budgets, params,
      banned_ids)
  new = budget.init(
      tables, rows.budgets, *_by_row((in_thinking, last_tokens, ~admitted)))
  new = dataclasses.replace(
      new, draws=_by_row(draws),
      running=state.running and state.running.restart())
  # Rows that were not admitted keep their state, in the midst of decoding.
  pick = lambda a, b: jnp.where(
      _by_row(admitted).reshape(-1, *(1 for _ in a.shape[1:])), a, b)
  return rows, jax.tree.map(pick, new, state)


@functools.partial(jax.jit, static_argnames="settings")
def done(tables, budgets, zeros, settings: confidence.Confidence | None):
  """Makes the `BudgetState` of rows that are all idle.

  `zeros` is [B] int32; it gives the shape. `settings` are those of the running
  entropy and confidence, None for neither.
  """
  zeros = _by_row(zeros)
  state = budget.init(tables, _by_row(budgets), zeros > 0, zeros, zeros == 0)
  if settings is None:
    return state
  return dataclasses.replace(state, running=confidence.init(
      settings, zeros, tables.held))


@jax.jit
def _end(state, rows, reason):
  """Ends those of rows [B] bool that are not done."""
  return budget.end(state, _by_row(rows) & ~state.done, reason)


@functools.partial(jax.jit, static_argnames="rows")
def repeated(x, *, rows: int):
  """Repeats one row's state of a logits processor to [rows, ...]."""
  return _by_row(jnp.broadcast_to(x, (rows, *x.shape)))


@functools.partial(jax.jit, donate_argnames="state")
def set_row(state, new, row):
  """Replaces one row of a logits processor's state; `new` has no row axis."""
  return jax.tree.map(
      lambda x, values: x.at[row].set(
          values, out_sharding=spec("rows", *(None for _ in x.shape[1:]))),
      state, new)
