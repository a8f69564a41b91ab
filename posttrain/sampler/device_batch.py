"""What of the engine lives on the device: its slots, and what is done to them.

  B: slots  S: cache slots of each  N: steps of a chunk
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
  decode,
  logits_processors,
  prefill,
  requests,
  token_sampling,
)
from posttrain.sampler.requests import Request
from posttrain.sharding import shard, spec


class Programs:
  """Calls compiled functions, and knows how many of them there are.

  Attributes:
    seconds: of the first call of each, by name and shapes.
  """

  def __init__(self, log: Callable[[str], None]):
    self.seconds: dict[tuple, float] = {}
    self._log = log

  def __call__(self, key: tuple, function: Callable, *args, **kwargs) -> Any:
    """`key` names the function and all that it compiles anew for."""
    if key in self.seconds:
      return function(*args, **kwargs)
    started = time.monotonic()
    result = function(*args, **kwargs)
    self.seconds[key] = time.monotonic() - started
    self._log(f"compiled {' '.join(map(str, key))} in "
              f"{self.seconds[key]:.1f} s")
    return result


class Slots:
  """B rows that decode together, each for a request of its own or idle.

  Attributes:
    carry: of the decode loop.
  """

  def __init__(
      self, config: ModelConfig, tables: budget.BudgetTables, *, slots: int,
      size: int, max_ids: int, cache_dtype: str, recorded: decode.Recorded,
      hook: logits_processors.Hook | None, policy: decode.Policy | None,
      run: Programs,
  ):
    """All slots idle; S is `size`."""
    self.tables, self.count = tables, slots
    self._max_ids, self._recorded, self._hook = max_ids, recorded, hook
    self._policy, self._run = policy, run
    self._rows: decode.Rows | None = None
    rows = run(("empty", slots, size), prefill.empty, config, np.int32(0),
               rows=slots, slots=size, cache_dtype=cache_dtype)
    budgets, *_ = requests.columns([None] * slots, max_ids)
    zeros = np.zeros(slots, np.int32)
    self.carry = decode.Carry(
        rows.cache, rows.hidden,
        run(("done",), done, tables, budgets, zeros),
        hook and jax.tree.map(
            lambda x: repeated(np.asarray(x), rows=slots),
            hook.init((0,), None)),
        run(("earlier",), no_earlier, rows.hidden, tables)
        if tables.recalled else None)

  @property
  def size(self) -> int:
    """S."""
    return self.carry.cache.slots

  def resize(self, size: int) -> None:
    """Another S."""
    self.carry = self._run(
        ("resize", self.size, size), decode.resize, self.carry, slots=size)

  def begin(
      self, asked: Sequence[Request | None], slots: Sequence[int],
      place: Callable[[prefill.Rows], prefill.Rows],
  ) -> None:
    """New requests in some of the slots.

    Args:
      asked: [B] of all slots; None is idle.
      slots: the new ones.
      place: puts their prompts there.
    """
    placed = place(prefill.Rows(self.carry.cache, self.carry.hidden))
    self._rows, state = self._run(
        ("begin",), begin, self.carry.state, self.tables,
        *begin_arguments(asked, slots, self.tables, self._max_ids))
    hook_state = self.carry.hook
    if self._hook is not None:
      for slot in slots:
        request = asked[slot]
        assert request is not None
        hook_state = self._run(
            ("hook",), set_row, hook_state,
            self._hook.init(request.prompt, request.hook), np.int32(slot))
    self.carry = dataclasses.replace(
        self.carry, cache=placed.cache, hidden=placed.hidden, state=state,
        hook=hook_state)

  def decode(
      self, model: Transformer, blocks: list[Block], script: np.ndarray,
      until: int,
  ) -> tuple[dict[str, np.ndarray], Any]:
    """A chunk: its record and the state behind it, fetched."""
    assert self._rows is not None
    self.carry, record = self._run(
        ("decode", self.size), decode.decode, model, blocks, self.carry,
        self._rows, sharding.put(script, "rows", "slots"), np.int32(until),
        self.tables, steps=script.shape[1], recorded=self._recorded,
        hook=self._hook, policy=self._policy)
    return sharding.fetch((record, self.carry.state))

  def end(self, rows: Sequence[bool], reason: int) -> None:
    """Rows go on no further; those that are done stay as they are."""
    state = self._run(
        ("end",), _end, self.carry.state, np.array(rows), np.int32(reason))
    self.carry = dataclasses.replace(self.carry, state=state)


def begin_arguments(
    asked: Sequence[Request | None], slots: Sequence[int],
    tables: budget.BudgetTables, max_ids: int,
) -> tuple[Any, ...]:
  """What `begin` takes behind the tables, as NumPy; see `Slots.begin`."""
  budgets, params, banned_ids, keys = requests.columns(asked, max_ids)
  prompts = [request.prompt if request else (0,) for request in asked]
  lengths = np.array([len(p) for p in prompts], np.int32)
  return (
      keys, (lengths, budgets, params, banned_ids),
      np.array([requests.in_thinking(p, tables) for p in prompts]),
      np.array([p[-1] for p in prompts], np.int32),
      np.isin(np.arange(len(asked)), slots))


def _by_row(tree: Any) -> Any:
  return jax.tree.map(
      lambda x: shard(
          jnp.asarray(x), "rows", *(None for _ in x.shape[1:])), tree)


@jax.jit
def begin(state, tables, keys, columns, in_thinking, last_tokens, admitted):
  """`decode.Rows`, and the budgets' state with new rows at their beginning."""
  lengths, budgets, params, banned_ids = _by_row(columns)
  rows = decode.Rows(
      lengths, token_sampling.row_keys(**_by_row(keys)), budgets, params,
      banned_ids)
  new = budget.init(
      tables, rows.budgets, *_by_row((in_thinking, last_tokens, ~admitted)))
  pick = lambda a, b: jnp.where(
      _by_row(admitted).reshape(-1, *(1 for _ in a.shape[1:])), a, b)
  return rows, jax.tree.map(pick, new, state)


@jax.jit
def done(tables, budgets, zeros):
  """The budgets' state of slots that are all idle."""
  zeros = _by_row(zeros)
  return budget.init(tables, _by_row(budgets), zeros > 0, zeros, zeros == 0)


no_earlier = jax.jit(decode.no_earlier)


@jax.jit
def _end(state, rows, reason):
  return budget.stop(state, _by_row(rows), reason)


@functools.partial(jax.jit, static_argnames="rows")
def repeated(x, *, rows: int):
  """[rows, ...] of one row's state of a hook."""
  return _by_row(jnp.broadcast_to(x, (rows, *x.shape)))


@functools.partial(jax.jit, donate_argnames="state")
def set_row(state, new, slot):
  """A hook's state with another row in `slot`."""
  return jax.tree.map(
      lambda x, row: x.at[slot].set(
          row, out_sharding=spec("rows", *(None for _ in x.shape[1:]))),
      state, new)
