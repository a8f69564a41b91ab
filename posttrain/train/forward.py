"""The model on a microbatch: the logprob of each token, however it lies.

The head is gathered once for all chunks of the length: each would gather it
anew, forward and backward. Where the mesh splits the length, each part of a
row goes through the head like a row of its own; only the shift by one, from
the token that is predicted to the position that predicts it, looks across.

  R: rows    T: length
"""

import jax
import jax.numpy as jnp

from posttrain import sharding
from posttrain.model import head as head_lib
from posttrain.model import moe
from posttrain.model.transformer import Transformer
from posttrain.objectives import logprobs as logprobs_lib


def token_logprobs(
    model: Transformer, batch: dict[str, jax.Array], *, chunk: int,
    temperature: float = 1.0,
) -> tuple[jax.Array, jax.Array, moe.Traffic | None]:
  """Logprobs and entropies [R, T], and what the routers did.

  Args:
    batch: `tokens`, `positions`, `segment_ids` and, if prompts are shared,
      `prefix_ids`: [R, T], laid out alike.
    chunk, temperature: see `objectives.logprobs.token_logprobs`.
  """
  tokens = batch["tokens"]
  hidden, traffic = model.routed(
      tokens, batch["positions"], batch["segment_ids"],
      batch.get("prefix_ids"))
  whole = model.gathered(model.head_name)
  head: logprobs_lib.Head = whole
  if hidden.dtype == jnp.bfloat16:
    head = head_lib.InParts(whole, head_lib.parts_of(whole.head_table()))
  compute = (_by_part if sharding.splits_length(tokens)
             else logprobs_lib.token_logprobs)
  logprobs, entropy = compute(
      head, hidden, tokens, chunk=chunk, temperature=temperature)
  assert entropy is not None  # As asked for.
  return logprobs, entropy, traffic


def _by_part(
    head: logprobs_lib.Head, hidden: jax.Array, tokens: jax.Array, *,
    chunk: int, temperature: float,
) -> tuple[jax.Array, jax.Array]:
  """`logprobs_lib.token_logprobs` of a length that the mesh splits."""
  def shifted(x, before, after):
    """Cut at one end and filled up at the other; these arrays are small."""
    x = sharding.whole_length(x)[:, after:x.shape[1] - before]
    return sharding.shard(
        jnp.pad(x, ((0, 0), (before, after))), "batch", "length")

  logprobs, entropy = logprobs_lib.next_logprobs(
      head, sharding.length_to_rows(hidden),
      sharding.length_to_rows(shifted(tokens, 0, 1)), chunk=chunk,
      temperature=temperature)
  assert entropy is not None  # As asked for.
  back = lambda x: shifted(sharding.rows_to_length(x), 1, 0)
  return back(logprobs), back(entropy)
