"""Decode loop as compiled, and the bytes that a step of it moves.

  B: rows  S: cache slots  N: steps of a chunk
"""

import re

import jax
import jax.numpy as jnp
import numpy as np

from posttrain import sharding
from posttrain.model import transformer
from posttrain.model.config import ModelConfig
from posttrain.sampler import budget_tables, decode, device_batch
from posttrain.sampler.requests import Request, Settings
from posttrain.text import thinking

WIDTHS = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2,
          "u16": 2, "f32": 4, "s32": 4, "u32": 4}
ARRAY = re.compile(r"(\w+)\[([\d,]*)\](\{[^}]*\})?")
INSTRUCTION = re.compile(
    r"(?:ROOT )?%?(\S+) = (\(.*?\)|\S+) ([\w-]+)\((.*)")
# What moves nothing, or is counted where it began.
FREE = {"parameter", "get-tuple-element", "tuple", "bitcast", "constant",
        "copy-done", "slice-done", "async-done"}


def compile_decode(
    config: ModelConfig, *, rows: int, slots: int, steps: int,
    cache_dtype: str = "compute", weights_dtype: str = "compute"):
  """Compiles the loop on the current mesh, whose devices need not be here.

  Returns:
    The compiled loop, bytes of what a step has to read of the weights (all
    but the embedding, which is read as the head), and of the cache.
  """
  tables = budget_tables.BudgetTables.of_ids(
      thinking.ThinkingIds(), (2,), np.zeros(config.vocab_size, bool))
  call = lambda key, function, *args, **kwargs: function(*args, **kwargs)

  def make(model):
    made = device_batch.DeviceBatch(
        config, tables, Settings(
            max_num_seqs=rows, max_seq_len=slots, min_seq_len=slots,
            cache_dtype=cache_dtype), call)
    made.begin([Request(prompt=(1,), max_tokens=9)] * rows, range(rows),
               lambda placed: placed)
    script = jnp.full((rows, steps), -1, jnp.int32,
                      out_sharding=sharding.spec("rows", None))
    return made.carry, made._rows, script, model.unstacked(weights_dtype)

  model = jax.tree.map(
      lambda w: jax.ShapeDtypeStruct(
          w.shape, config.dtype, sharding=w.sharding),
      transformer.abstract(config))
  carry, asked, script, blocks = jax.eval_shape(make, model)
  compiled = decode.decode.lower(
      model, blocks, carry, asked, script, jax.ShapeDtypeStruct((), jnp.int32),
      tables, steps=steps, recorded=decode.Recorded(counts=True)).compile()
  size = lambda tree: sum(
      x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))
  return (compiled, size(blocks) + size(model.embedding),
          size(carry.cache.layers))


def step_bytes(text: str) -> int:
  """To and from memory in one step: operands and results of the loop's body.

  What lies in the fast memory, S(1) in a layout, is not counted; of a slice
  that is fetched ahead, the slice is; of an update in place, the update.
  """
  body = _body(text)
  types, total = {}, 0
  for line in body:
    found = INSTRUCTION.match(line)
    if not found:
      continue
    name, shape, op, rest = found.groups()
    types[name] = shape
    args = re.findall(r"%([\w.\-]+)", rest.split("), ")[0])
    if op in FREE or op == "while":
      continue
    if op == "dynamic-update-slice":
      total += 2 * _size(types.get(args[1], ""))
    elif op in ("slice-start", "copy-start"):
      # ((operand), result, ...): read once, wherever it goes.
      inside = ARRAY.findall(shape)
      total += _array_size(*inside[1][:2])
    else:
      total += _size(shape) + sum(_size(types.get(arg, "")) for arg in args)
  return total


def _body(text: str) -> list[str]:
  """The instructions of the largest loop's body."""
  computations: dict[str, list[str]] = {}
  lines: list[str] = []
  for line in text.splitlines():
    if line and not line[0].isspace() and "{" in line:
      name = line.removeprefix("ENTRY ").split()[0].lstrip("%")
      lines = computations.setdefault(name, [])
    else:
      lines.append(line.strip())
  bodies = re.findall(r"body=%?([\w.\-]+)", text)
  return max((computations[body] for body in bodies), key=len)


def _size(shape: str) -> int:
  return sum(_array_size(kind, dims) for kind, dims, layout
             in ARRAY.findall(shape) if "S(1)" not in layout)


def _array_size(kind: str, dims: str) -> int:
  return WIDTHS.get(kind, 0) * int(np.prod([int(d) for d in dims.split(",")
                                            if d], dtype=np.int64))
