"""Oracles: a full log_softmax, one mesh against another, the jaxpr."""

import dataclasses
import functools

import jax
import jax.extend.core
import jax.numpy as jnp
import numpy as np
import pytest

from posttrain import sharding
from posttrain.model import token_logprobs
from tests import meshes

B, T, D, V, PADDED = 8, 10, 16, 60, 64


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["head"], meta_fields=[])
@dataclasses.dataclass
class Head:
  """A language model's last layer alone."""

  head: jax.Array  # [D, PADDED]

  def logits(self, hidden):
    logits = jnp.einsum(
        "bcd,dv->bcv", hidden, sharding.gather_fsdp(self.head),
        out_sharding=sharding.spec("batch", "length", "vocab"))
    return jnp.where(jnp.arange(PADDED) < V, logits, -1e30)


def arrays():
  rng = np.random.default_rng(0)
  return (rng.normal(size=(D, PADDED)).astype(np.float32),
          rng.normal(size=(B, T, D)).astype(np.float32),
          rng.integers(0, V, (B, T)).astype(np.int32),
          rng.normal(size=(B, T)).astype(np.float32))


def full(head, hidden, tokens, temperature):
  """The definition, with all logits at once."""
  logits = jnp.einsum("btd,dv->btv", hidden, head)[..., :V] / temperature
  table = jax.nn.log_softmax(logits)
  taken = jnp.take_along_axis(table[:, :-1], tokens[:, 1:, None], 2)[..., 0]
  entropy = -jnp.sum(jnp.exp(table) * table, axis=-1)[:, :-1]
  return tuple(jnp.pad(x, ((0, 0), (1, 0))) for x in (taken, entropy))


def chunked(mesh, **options):
  """Logprobs, entropy, and the gradients of a weighted sum, on a mesh."""
  head, hidden, tokens, weights = arrays()

  def loss(model, hidden, tokens, weights):
    got = token_logprobs.of_hidden(model.logits, hidden, tokens, **options)
    return jnp.sum(got[0] * weights), got

  with jax.set_mesh(mesh):
    (_, got), grads = jax.jit(
        jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))(
            Head(sharding.put(head, "embed", "vocab")),
            sharding.put(hidden, "batch", None, None),
            sharding.put(tokens, "batch", None),
            sharding.put(weights, "batch", None))
    layouts = [str(jax.typeof(x)) for x in (*got, grads[0].head)]
    return layouts, *sharding.fetch((*got, grads[0].head, grads[1]))


@pytest.mark.parametrize("shape", [(1, 1), (4, 2)])
@pytest.mark.parametrize("chunk,temperature", [(3, 1.0), (5, 0.7), (99, 1.0)])
def test_chunks_equal_a_full_log_softmax(shape, chunk, temperature):
  head, hidden, tokens, weights = arrays()

  def loss(head, hidden):
    got = full(head, hidden, tokens, temperature)
    return jnp.sum(got[0] * weights), got

  (_, want), grads = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(
      head, hidden)
  mesh = meshes.mesh(*shape)
  layouts, *got = chunked(mesh, chunk=chunk, temperature=temperature)
  assert layouts == [
      f"float32[{B}@fsdp,{T}]", f"float32[{B}@fsdp,{T}]",
      f"float32[{D}@fsdp,{PADDED}@tensor]"]
  for one, two in zip(got, (*want, *grads), strict=True):
    np.testing.assert_allclose(one, two, rtol=2e-5, atol=2e-5)
  assert (got[0][:, 0] == 0).all() and (got[1][:, 0] == 0).all()


def shapes_in(jaxpr):
  """Every array that a program names, those of its inner programs too."""
  for equation in jaxpr.eqns:
    yield from (v.aval.shape for v in equation.outvars)
    for inner in jax.extend.core.jaxprs_in_params(equation.params):
      yield from shapes_in(inner)


def test_no_logits_of_the_whole_length_exist():
  head, hidden, tokens, weights = arrays()

  def loss(run, head, hidden):
    return jnp.sum(run(head, hidden)[0] * weights)

  def largest(run):
    program = jax.make_jaxpr(jax.grad(
        functools.partial(loss, run), argnums=(0, 1)))(head, hidden)
    return max(np.prod(shape, initial=1) for shape in shapes_in(program.jaxpr))

  with jax.set_mesh(sharding.make_mesh(1, 1, devices=jax.devices()[:1])):
    got = largest(lambda head, hidden: token_logprobs.of_hidden(
        Head(sharding.shard(head, "embed", "vocab")).logits, hidden, tokens,
        chunk=2))
    assert got == max(B * T * D, B * 2 * PADDED)
    # The search itself sees them where they are.
    assert largest(lambda head, hidden: full(
        head, hidden, tokens, 1.0)) >= B * T * V


def test_one_token_has_no_predictor():
  head, hidden, tokens, _ = arrays()
  with jax.set_mesh(sharding.make_mesh(1, 1, devices=jax.devices()[:1])):
    got, entropy = token_logprobs.of_hidden(
        Head(sharding.put(head, "embed", "vocab")).logits,
        sharding.put(hidden[:, :1], "batch", None, None),
        sharding.put(tokens[:, :1], "batch", None))
  for x in (got, entropy):
    np.testing.assert_array_equal(sharding.fetch(x), np.zeros((B, 1)))


@pytest.mark.parametrize("options,key", [
    (dict(temperature=0.0), "rollout.temperature"),
    (dict(chunk=0), "compute.loss_chunk")])
def test_impossible_options_name_their_config_key(options, key):
  head, hidden, tokens, _ = arrays()
  with pytest.raises(ValueError, match=key):
    token_logprobs.of_hidden(Head(head).logits, hidden, tokens, **options)
