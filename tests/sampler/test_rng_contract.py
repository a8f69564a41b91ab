"""A row's tokens depend on its request and on nothing around it.

The random bits are a function of (seed, stage, step, prompt_id, sample_id,
step of the row). Where the programs differ (another number of rows, cache
offset or mesh) float32 rounds differently, and two tokens whose perturbed
logits lie within 1e-4 may trade places: such cases are counted and printed.
"""

import jax
import numpy as np
import pytest

from posttrain.sampler.sampler import Limits
from tests import meshes
from tests.model import build
from tests.sampler import numpy_sampler
from tests.sampler.forcing import Strings
from tests.sampler.numpy_sampler import Request, make_sampler

V = 31
STRINGS = Strings(
    start=(3,), end=(4, 5), delimiters=((7,),), final_answer=(6,), wait=(8,),
    stop_ids=(2,), vocab_size=V)
LIMITS = dict(
    max_tokens=40, max_thinking_tokens=16, min_thinking_tokens=3, num_waits=2)
PROMPTS = {
    11: [9, 3], 12: [17, 20, 21, 3], 13: [25, 3], 14: [30, 29, 28, 27, 3]}
CONFIG = build.make_config(vocab_size=V)


@pytest.fixture(scope="module")
def params():
  with jax.set_mesh(meshes.one()):
    return build.random_params(CONFIG)


def run(params, prompt_ids, *, mesh=None, group_size=2, chunk=64,
        max_prompt_tokens=6, first_sample=0, seed=7, stage="reason", step=3,
        prompts=PROMPTS, max_num_seqs=0):
  sampler = make_sampler(
      STRINGS, max_prompt_tokens=max_prompt_tokens, chunk=chunk,
      max_num_seqs=max_num_seqs)
  with jax.set_mesh(mesh or meshes.one()):
    return sampler.generate(
        build.load(CONFIG, params), [prompts[i] for i in prompt_ids],
        Limits(**LIMITS), prompt_id=prompt_ids, group_size=group_size,
        seed=seed, stage=stage, step=step, first_sample=first_sample)


@pytest.fixture(scope="module")
def rollouts(params):
  return run(params, list(PROMPTS))


def by_request(rollouts):
  ids = zip(rollouts.prompt_id.tolist(), rollouts.sample_id.tolist(),
            strict=True)
  return {request: row for row, request in enumerate(ids)}


def assert_same(params, a, b, at_least):
  """Rows of the same request are equal up to near-ties."""
  rows, others = by_request(a), by_request(b)
  shared = sorted(rows.keys() & others.keys())
  assert len(shared) >= at_least
  ties = sum(
      differs(params, a, b, rows[request], others[request])
      for request in shared)
  print(f"{ties} near-ties in {len(shared)} rows")
  assert ties <= 1


def differs(params, a, b, row, other):
  """Returns True if a near-tie parts the rows; fails if anything else does."""
  x, y = a.completion(row), b.completion(other)
  same = next((i for i, (s, t) in enumerate(zip(x, y, strict=False))
               if s != t), min(len(x), len(y)))
  np.testing.assert_allclose(
      a.logprobs[row, :same], b.logprobs[other, :same], rtol=0, atol=5e-5)
  if x == y:
    return False
  for rollouts, i in ((a, row), (b, other)):
    # The NumPy sampler follows either side, and says where it had a choice.
    told, _, near = numpy_sampler.sample(
        params, CONFIG, rollouts, i, STRINGS, Limits(**LIMITS),
        Request(seed=7, stage="reason", step=3))
    assert told.tokens == rollouts.completion(i)
    if near:
      return True
  raise AssertionError(f"{x} and {y} part at {same} without a near-tie")


def test_rows_are_the_contracts(params, rollouts):
  """Each row, drawn anew in NumPy with the noise that the contract names."""
  for row in range(len(rollouts.prompts)):
    told, _, _ = numpy_sampler.sample(
        params, CONFIG, rollouts, row, STRINGS, Limits(**LIMITS),
        Request(seed=7, stage="reason", step=3))
    assert told.tokens == rollouts.completion(row)


def test_the_same_schedule_is_bitwise_equal(params, rollouts):
  again = run(params, list(PROMPTS))
  np.testing.assert_array_equal(again.tokens, rollouts.tokens)
  np.testing.assert_array_equal(again.logprobs, rollouts.logprobs)


def test_another_row_and_other_neighbours_are_bitwise_equal(params, rollouts):
  """In one program a row's place and its neighbours change no bit."""
  others = PROMPTS | {21: [13, 14, 15], 22: [16, 3], 23: [10, 3]}
  moved = run(params, [21, 12, 22, 11], prompts=others)
  rows, others = by_request(rollouts), by_request(moved)
  for request in ((11, 0), (11, 1), (12, 0), (12, 1)):
    i, j = rows[request], others[request]
    assert i != j or request[0] == 12
    assert rollouts.completion(i) == moved.completion(j)
    np.testing.assert_array_equal(
        rollouts.logprobs[i, :rollouts.lengths[i]],
        moved.logprobs[j, :moved.lengths[j]])


@pytest.mark.parametrize("change,at_least", [
    (dict(prompt_ids=[12], group_size=1, max_prompt_tokens=9), 1),
    (dict(prompt_ids=[14, 11], group_size=4), 4),
    (dict(first_sample=1), 4),
    (dict(chunk=16), 8),
    (dict(max_num_seqs=3, chunk=16), 8),
], ids=["alone", "group_size", "first_sample", "chunk", "max_num_seqs"])
def test_another_schedule_gives_the_same_tokens(
    params, rollouts, change, at_least):
  other = run(params, **(dict(prompt_ids=list(PROMPTS)) | change))
  assert_same(params, rollouts, other, at_least)


@pytest.mark.parametrize("max_num_seqs,mesh", [
    (0, meshes.eight), (4, meshes.eight),
    pytest.param(0, meshes.with_context, marks=pytest.mark.slow),
    pytest.param(4, meshes.with_context, marks=pytest.mark.slow)])
def test_another_mesh_gives_the_same_tokens(
    params, rollouts, max_num_seqs, mesh):
  """Three prompts on four parts: padding rows too."""
  other = run(params, [11, 13, 14], mesh=mesh(), max_num_seqs=max_num_seqs)
  assert_same(params, rollouts, other, 6)


@pytest.mark.parametrize("change", [
    dict(seed=8), dict(stage="another"), dict(step=4), dict(first_sample=2)],
    ids=lambda change: next(iter(change)))
def test_another_request_gives_other_tokens(params, rollouts, change):
  other = run(params, list(PROMPTS), **change)
  for row in range(len(rollouts.prompts)):
    assert rollouts.completion(row) != other.completion(row)


def test_another_prompt_id_gives_other_tokens(params, rollouts):
  prompts = {i + 10: prompt for i, prompt in PROMPTS.items()}
  other = run(params, list(prompts), prompts=prompts)
  for row in range(len(rollouts.prompts)):
    assert rollouts.prompts[row] == other.prompts[row]
    assert rollouts.completion(row) != other.completion(row)


def test_samples_of_a_prompt_differ(rollouts):
  for row in range(0, len(rollouts.prompts), 2):
    assert rollouts.prompts[row] == rollouts.prompts[row + 1]
    assert rollouts.completion(row) != rollouts.completion(row + 1)


@pytest.mark.parametrize("max_num_seqs", [0, 3])
def test_a_prompt_asked_again_goes_on_with_its_samples(
    params, rollouts, max_num_seqs):
  """Three asks in one step are the six samples of one, and all differ."""
  asked = run(params, [12, 11, 12, 12], max_num_seqs=max_num_seqs,
              first_sample=np.array([0, 0, 2, 4]))
  assert asked.prompt_id.tolist() == [12, 12, 11, 11, 12, 12, 12, 12]
  assert asked.sample_id.tolist() == [0, 1, 0, 1, 2, 3, 4, 5]
  assert_same(params, asked, run(params, [12], group_size=6), 6)
  assert_same(params, asked, rollouts, 4)
  texts = {tuple(asked.completion(row)) for row in (0, 1, 4, 5, 6, 7)}
  assert len(texts) == 6
