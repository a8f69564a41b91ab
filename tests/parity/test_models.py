"""Every family, from a checkpoint of transformers and back into one.

Oracle: transformers on torch, float32, eager attention. Gradients are read
as if they were weights: what takes a weight to its place is linear.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from posttrain import sharding
from posttrain.interop import hugging_face
from posttrain.model import token_logprobs
from posttrain.sampler import budget_tables, sampler, token_sampling
from posttrain.text import thinking
from posttrain.text import tokenizer as tokenizer_lib
from tests import meshes
from tests.parity import releases
from tests.text import families

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

LENGTH = 40
# Segments of two packed rows; what is left of a row is padding.
SEGMENTS = ((17, 14), (33,))
NEW_TOKENS = 64


@pytest.fixture(scope="module", params=[
    pytest.param(name, marks=pytest.mark.xdist_group(name))
    for name in releases.CASES])
def name(request):
  return request.param


@pytest.fixture(scope="module")
def release(name, tmp_path_factory):
  """Directory, transformers' model and ours."""
  directory = tmp_path_factory.mktemp(name)
  theirs = releases.write(directory, name)
  with jax.set_mesh(meshes.one()):
    files = hugging_face.read(directory)
    ours = hugging_face.load(files, hugging_face.model_config(files))
  return directory, theirs, ours


def ids(*shape: int) -> np.ndarray:
  return np.random.default_rng(0).integers(3, 600, shape).astype(np.int32)


def put(*arrays) -> list[jax.Array]:
  return [sharding.put(x, "batch", "length") for x in arrays]


@jax.jit
def model_logits(model, tokens, positions, segment_ids):
  return model.logits(model(tokens, positions, segment_ids))


def test_logits(name, release):
  _, theirs, ours = release
  tokens = ids(2, LENGTH)
  with torch.no_grad():
    want = releases.logits(theirs, tokens).numpy()
  positions = np.broadcast_to(
      np.arange(LENGTH, dtype=np.int32), tokens.shape)
  with jax.set_mesh(meshes.one()):
    got = sharding.fetch(model_logits(
        ours, *put(tokens, positions, np.ones_like(tokens))))
  worst = np.abs(got[..., :want.shape[-1]] - want).max()
  print(f"{name}: largest difference in logits {worst:.1e}, of up to "
        f"{np.abs(want).max():.1f}")
  assert worst < 1e-4


def packed() -> dict[str, np.ndarray]:
  """Rows that hold several examples and padding."""
  tokens = ids(len(SEGMENTS), LENGTH)
  positions, segment_ids = np.zeros_like(tokens), np.zeros_like(tokens)
  for row, lengths in enumerate(SEGMENTS):
    start = 0
    for index, length in enumerate(lengths, start=1):
      positions[row, start:start + length] = np.arange(length)
      segment_ids[row, start:start + length] = index
      start += length
  return dict(tokens=tokens, positions=positions, segment_ids=segment_ids)


@jax.jit
@functools.partial(jax.value_and_grad)
def loss_and_gradient(model, tokens, positions, segment_ids):
  """The mean over the tokens that have a predecessor in their segment."""
  hidden = model(tokens, positions, segment_ids)
  found, _ = token_logprobs.of_hidden(model.logits, hidden, tokens, chunk=16)
  mask = (segment_ids > 0) & (positions > 0)
  return -jnp.sum(found * mask) / jnp.sum(mask)


def their_loss(theirs) -> "torch.Tensor":
  """One example at a time, without padding or packing."""
  batch, total, count = packed(), 0.0, 0
  for row, lengths in enumerate(SEGMENTS):
    start = 0
    for length in lengths:
      tokens = torch.tensor(
          batch["tokens"][row, start:start + length]).long()
      logits = theirs(tokens[None]).logits[0, :-1]
      total = total + torch.nn.functional.cross_entropy(
          logits, tokens[1:], reduction="sum")
      count, start = count + length - 1, start + length
  return total / count


def test_loss_and_gradients_on_a_packed_batch(name, release, tmp_path):
  directory, _, ours = release
  theirs = releases.read(directory)
  loss = their_loss(theirs)
  loss.backward()
  with torch.no_grad():
    for parameter in theirs.parameters():
      parameter.copy_(parameter.grad)
  theirs.save_pretrained(tmp_path)
  with jax.set_mesh(meshes.one()):
    files = hugging_face.read(tmp_path)
    want = hugging_face.load(files, hugging_face.model_config(files))
    value, got = loss_and_gradient(ours, *put(*packed().values()))
  np.testing.assert_allclose(value, loss.item(), rtol=1e-5)
  worst = 0.0
  for (path, a), b in zip(
      jax.tree.leaves_with_path(want), jax.tree.leaves(got), strict=True):
    a, b = np.asarray(a), np.asarray(b)
    scale = np.abs(a).max()
    assert scale > 0, f"{jax.tree_util.keystr(path)} has no gradient"
    worst = max(worst, np.abs(a - b).max() / scale)
  print(f"{name}: largest difference of a gradient, of its largest entry, "
        f"{worst:.1e}; loss {loss.item():.4f}, difference "
        f"{abs(float(value) - loss.item()):.1e}")
  assert worst < 2e-5


def greedy(ours, vocab_size: int, prompts: np.ndarray) -> np.ndarray:
  none = thinking.ThinkingIds()
  tables = budget_tables.BudgetTables.of_ids(
      none, (), np.zeros(vocab_size, bool))
  drawn = sampler.Sampler(
      tables=tables,
      params=token_sampling.SamplingParams(temperature=0.0),
      max_prompt_tokens=16, chunk=32).generate(
          ours, [row.tolist() for row in prompts],
          sampler.Limits(max_tokens=NEW_TOKENS),
          prompt_id=range(len(prompts)), seed=0, stage="parity")
  return drawn.tokens


def test_greedy_generation(release):
  """Prompt and completion pass the window and the first context."""
  _, theirs, ours = release
  prompts = ids(4, 12)
  theirs.generation_config.eos_token_id = None
  want = theirs.generate(
      torch.tensor(prompts).long(), do_sample=False,
      attention_mask=torch.ones(prompts.shape),
      max_new_tokens=NEW_TOKENS)[:, prompts.shape[1]:]
  with jax.set_mesh(meshes.one()):
    got = greedy(ours, theirs.config.vocab_size, prompts)
  np.testing.assert_array_equal(got, want.numpy())


def test_the_export_is_a_release_again(name, release, tmp_path):
  """Weights to the bit, logits equal, tokenizer, template and stop tokens."""
  directory, theirs, ours = release
  tokenizer = tokenizer_lib.load(directory)
  output = tmp_path / "export"
  with jax.set_mesh(meshes.one()):
    hugging_face.save(
        ours, output, tokenizer=tokenizer, shard_bytes=100_000)
  back = releases.read(output)
  state = back.state_dict()
  for key, weight in theirs.state_dict().items():
    assert torch.equal(weight, state[key]), key
  tokens = ids(2, LENGTH)
  with torch.no_grad():
    assert torch.equal(
        releases.logits(back, tokens), releases.logits(theirs, tokens))
  read = transformers.AutoTokenizer.from_pretrained(output)
  original = transformers.AutoTokenizer.from_pretrained(directory)
  text = families.STRESS[0]
  assert read(text).input_ids == original(text).input_ids
  assert read.chat_template == original.chat_template
  assert set(np.ravel(back.generation_config.eos_token_id)) == set(
      tokenizer.stop_ids)
