"""Oracles: the sampler in NumPy, and the training program's logprobs."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from posttrain import sharding
from posttrain.sampler import budget_state, decode, prefill
from posttrain.sampler.sampler import Limits
from tests import meshes
from tests.model import build, numpy_transformer
from tests.sampler import numpy_sampler
from tests.sampler.forcing import Strings
from tests.sampler.numpy_sampler import Request, make_sampler

V = 13  # Few ids, so that delimiters of several tokens do occur.
PROMPT, CHUNK = 8, 64
GROUP_SIZE, ROWS = 2, 16
TEMPERATURE = 1.5
REQUEST = Request(seed=7, stage="reason", step=3)

# A delimiter that is replaced by `end`, and one that takes tokens back.
REPLACED = Strings(
    start=(3,), end=(4, 5), delimiters=((7,), (10, 11)), newline=(1,),
    final_answer=(6, 9), wait=(8, 9), stop_ids=(2,),
    ends_newline=frozenset([1]), vocab_size=V)
# s1's: the delimiter begins `end`; no wait text, so contexts are fed again.
KEPT = Strings(
    start=(3,), end=(4, 5, 6), delimiters=((4,), (10, 11, 12)), newline=(1,),
    stop_ids=(2,), ends_newline=frozenset([1, 9]), vocab_size=V)
UNUSED = Strings(stop_ids=(2,), vocab_size=V)


def make_prompts(seed=0, count=ROWS // GROUP_SIZE):
  """Draws prompts of all lengths; five in eight open a thinking section."""
  rng = np.random.default_rng(seed)
  prompts = []
  for i in range(count):
    prompt = rng.integers(6, V, i % PROMPT).tolist()
    prompts.append([*prompt, 3 if i % 8 < 5 else 9])
  return prompts


def random_limits(seed=0, rows=ROWS):
  """Every combination, within what `generate` accepts."""
  rng = np.random.default_rng(seed)
  maximum = rng.integers(-1, 25, rows)
  minimum = np.where(
      maximum < 0, rng.integers(0, 9, rows),
      np.minimum(rng.integers(0, 9, rows), np.maximum(maximum, 0)))
  truncate = rng.random(rows) < 0.25
  needed = np.where((maximum >= 0) & ~truncate, maximum + 6, 1)
  return Limits(
      max_tokens=needed + rng.integers(0, 49 - needed),
      max_thinking_tokens=maximum, min_thinking_tokens=minimum,
      num_waits=rng.integers(0, 4, rows), truncate=truncate)


@functools.lru_cache(maxsize=2)
def scene(option, shape):
  """A mesh, a model on it, and its config and weights."""
  mesh = meshes.mesh(*shape)
  config = build.make_config(**(build.OPTIONS[option] | dict(vocab_size=V)))
  with jax.set_mesh(mesh):
    params = build.random_params(config)
    return mesh, build.load(config, params), config, params


def generate(model, strings, limits, prompts=None, script=None,
             request=REQUEST, temperature=TEMPERATURE, **params):
  prompts = make_prompts() if prompts is None else prompts
  sampler = make_sampler(
      strings, max_prompt_tokens=PROMPT, chunk=CHUNK,
      temperature=temperature, **params)
  return sampler.generate(
      model, prompts, limits, prompt_id=100 + np.arange(len(prompts)),
      group_size=GROUP_SIZE, seed=request.seed, stage=request.stage,
      step=request.step, script=script)


def assert_is_numpy(rollouts, params, config, strings, limits,
                    temperature=TEMPERATURE, **sampling):
  """Every row, token for token; logprobs to 5e-5. Returns the rows."""
  rows, ties = [], 0
  for row in range(len(rollouts.prompts)):
    told, logprobs, near = numpy_sampler.sample(
        params, config, rollouts, row, strings, limits, REQUEST,
        temperature=temperature, **sampling)
    assert numpy_sampler.as_row(rollouts, row) == told
    np.testing.assert_allclose(
        rollouts.logprobs[row, :len(logprobs)], logprobs, rtol=0, atol=5e-5)
    rows.append(told)
    ties += near
  print(f"{ties} near-ties in {(rollouts.raw >= 0).sum()} draws")
  assert ties <= 2
  return rows


def assert_is_teacher_forced(model, rollouts, strings, limits):
  """Sampled tokens under the training program; bans are renormalised."""
  rows = [
      prompt + rollouts.completion(row)
      for row, prompt in enumerate(rollouts.prompts)]
  width = PROMPT + CHUNK
  tokens = np.zeros((len(rows), width), int)
  segment_ids = np.zeros_like(tokens)
  for i, row in enumerate(rows):
    tokens[i, :len(row)] = row
    segment_ids[i, :len(row)] = 1
  order = np.broadcast_to(np.arange(width), tokens.shape)
  logits = sharding.fetch(build.full_logits(
      model, *build.put_rows(tokens, order, segment_ids)))
  gaps = []
  for i, prompt in enumerate(rollouts.prompts):
    bans = numpy_sampler.retell(rollouts, i, strings, limits).bans
    for t in np.flatnonzero(rollouts.loss_mask[i]):
      left = logits[i, len(prompt) + t - 1] / np.float64(TEMPERATURE)
      left[list(bans[t])] = -np.inf
      want = numpy_transformer.log_softmax(left)[rollouts.tokens[i, t]]
      gaps.append(abs(want - rollouts.logprobs[i, t]))
    # What was forced is recorded under the model alone.
    for t in np.flatnonzero(rollouts.provenance[i] == budget_state.FORCED):
      own = numpy_transformer.log_softmax(
          logits[i, len(prompt) + t - 1].astype(np.float64))
      gaps.append(abs(own[rollouts.tokens[i, t]] - rollouts.logprobs[i, t]))
  print(f"{len(gaps)} tokens: max {max(gaps):.2g}, mean {np.mean(gaps):.2g}")
  assert max(gaps) < 5e-5
  np.testing.assert_array_equal(
      rollouts.logprobs[rollouts.provenance == budget_state.NONE], 0)


PLACES = [
    ("tied", (1, 1), REPLACED), ("everything", (4, 2), REPLACED),
    ("everything", (1, 1), KEPT), ("tied", (4, 2), KEPT)]


@pytest.mark.parametrize(
    "option,shape,strings", PLACES,
    ids=["tied-one", "everything-eight", "everything-one", "tied-eight"])
def test_the_sampler_is_numpy(option, shape, strings):
  """Random budgets per row: tokens, provenance, ends, counts, logprobs."""
  mesh, model, config, params = scene(option, shape)
  with jax.set_mesh(mesh):
    rows, taken_back = [], 0
    for seed in (4, 5, 6):
      limits, prompts = random_limits(seed), make_prompts(seed)
      rollouts = generate(model, strings, limits, prompts)
      rows += assert_is_numpy(rollouts, params, config, strings, limits)
      assert_is_teacher_forced(model, rollouts, strings, limits)
      assert_keeps_budgets(rollouts, limits)
      taken_back += (rollouts.raw >= 0).sum() - rollouts.loss_mask.sum()
  assert {row.finish for row in rows} == {"eos", "budget", "length"}
  assert {row.closed for row in rows} == {"open", "natural", "budget"}
  # The cache has forgotten what it should: tokens sampled later agree.
  assert taken_back > 5 and sum(row.waits for row in rows) > 3


def assert_keeps_budgets(rollouts, limits):
  maximum = limits.max_thinking_tokens
  assert np.all((maximum < 0) | (rollouts.think_lengths <= maximum))
  assert np.all(rollouts.lengths <= limits.max_tokens)
  assert np.all(rollouts.wait_count <= limits.num_waits)


@pytest.mark.parametrize("option", build.quick_options(
    "multi_query", "experts"))
@pytest.mark.parametrize("forcing", ["free", "forced"])
def test_logprobs_are_the_training_programs(option, forcing):
  """For every model option, with budgets and without."""
  mesh, model, _, _ = scene(option, (1, 1))
  limits = random_limits(5) if forcing == "forced" else Limits(max_tokens=40)
  with jax.set_mesh(mesh):
    rollouts = generate(model, REPLACED, limits)
    assert_is_teacher_forced(model, rollouts, REPLACED, limits)
  assert rollouts.loss_mask.sum() > 100


def test_sequences_that_wait_are_numpy_and_replayed_bitwise():
  """Sixteen sequences through five rows, with budgets of their own."""
  mesh, model, config, params = scene("tied", (1, 1))
  limits, prompts = random_limits(9), make_prompts(9)
  with jax.set_mesh(mesh):
    rollouts = generate(model, REPLACED, limits, prompts, max_num_seqs=5)
    assert_is_numpy(rollouts, params, config, REPLACED, limits)
    assert_is_teacher_forced(model, rollouts, REPLACED, limits)
    again = generate(
        model, REPLACED, limits, prompts, rollouts.raw, max_num_seqs=5,
        request=Request(seed=8, stage="another", step=4))
  for name in ("tokens", "logprobs", "lengths", "raw", "finish_reason"):
    np.testing.assert_array_equal(
        getattr(rollouts, name), getattr(again, name))


@pytest.mark.parametrize("shape", [(1, 1), (4, 2)])
def test_a_replay_is_bitwise_equal(shape):
  """Same schedule, other noise, then other neighbours as well."""
  mesh, model, _, _ = scene("tied" if shape == (1, 1) else "everything", shape)
  limits, prompts = random_limits(), make_prompts()
  with jax.set_mesh(mesh):
    first = generate(model, REPLACED, limits, prompts)
    other = Request(seed=8, stage="another", step=4)
    again = generate(
        model, REPLACED, limits, prompts, first.raw, request=other)
    fresh = generate(model, REPLACED, limits, prompts, request=other)
    for name in ("tokens", "logprobs", "provenance", "lengths", "raw",
                 "finish_reason", "think_lengths", "wait_count"):
      np.testing.assert_array_equal(getattr(first, name), getattr(again, name))
    assert not np.array_equal(first.raw, fresh.raw)
    kept = [4, 5, 12, 13]
    script = np.full_like(first.raw, -1)
    script[kept] = first.raw[kept]
    changed = [p if i in (2, 6) else [6, *p[1:]]
               for i, p in enumerate(prompts)]
    crowd = generate(model, REPLACED, limits, changed, script, request=other)
  for row in kept:
    assert crowd.completion(row) == first.completion(row)
    np.testing.assert_array_equal(
        crowd.logprobs[row, :first.lengths[row]],
        first.logprobs[row, :first.lengths[row]])
  assert sum(crowd.completion(i) != first.completion(i) for i in range(16)) > 6


@pytest.mark.parametrize("sampling", [
    dict(temperature=0.7, top_k=6, top_p=0.95, min_p=0.02),
    dict(temperature=0.0)], ids=["truncated", "greedy"])
def test_without_thinking_it_samples_or_takes_the_best(sampling):
  mesh, model, config, params = scene("tied", (1, 1))
  limits = Limits(max_tokens=np.tile([1, 2, 5, 30], 4))
  with jax.set_mesh(mesh):
    rollouts = generate(model, UNUSED, limits, **sampling)
    assert_is_numpy(rollouts, params, config, UNUSED, limits, **sampling)
  np.testing.assert_array_equal(rollouts.think_lengths, 0)
  np.testing.assert_array_equal(rollouts.answer_lengths, rollouts.lengths)


FREE = make_sampler(
    Strings(vocab_size=V), max_prompt_tokens=PROMPT, chunk=8, temperature=5.0)


PROGRAMS = (decode.decode, decode.resize, prefill.empty, prefill.feed,
            prefill.place)


def test_one_decode_program_per_size_of_the_cache():
  """Budgets, prompts, weights and ids are data. Padding is never sampled."""
  mesh, model, _, _ = scene("tied", (1, 1))

  def run(max_tokens, seed):
    return FREE.generate(
        jax.tree.map(lambda w: w * (1 + seed), model), [[6, 7], [8]],
        Limits(max_tokens=max_tokens), prompt_id=[seed, 5], group_size=2,
        seed=seed, stage="x", step=seed)

  sizes = lambda: (prefill.feed._cache_size(), decode.decode._cache_size())
  with jax.set_mesh(mesh):
    prefills, decodes = sizes()
    first = run(32, 0)
    # Of 32 and 64 slots.
    assert sizes() == (prefills + 1, decodes + 2)
    assert run(20, 1).lengths.tolist() == [20] * 4
    run(3, 2)
    assert sizes() == (prefills + 1, decodes + 2)
  # At this temperature all 13 ids occur, and none of the 115 behind them.
  assert set(first.tokens.ravel().tolist()) == set(range(V))


@pytest.mark.parametrize("max_num_seqs", [0, 3])
def test_other_prompts_compile_nothing(max_num_seqs):
  """The ring is as large as the longest prompt allows, not the one at hand."""
  mesh, model, _, _ = scene("tied", (1, 1))
  some = dataclasses.replace(FREE, max_num_seqs=max_num_seqs)
  count = lambda: sum(program._cache_size() for program in PROGRAMS)

  def run(*prompts):
    return some.generate(
        model, prompts, Limits(max_tokens=40), prompt_id=range(len(prompts)),
        group_size=2, seed=0, stage="x")

  with jax.set_mesh(mesh):
    assert run([6] * PROMPT, [7]).lengths.tolist() == [40] * 4
    before = count()
    assert run([8, 9], [7]).lengths.tolist() == [40] * 4
    assert count() == before


def test_no_more_rows_than_requests():
  """Else the cache would be larger than what was asked needs."""
  asked = FREE.make_requests(
      [[6], [7, 8]], Limits(max_tokens=9), prompt_id=[0, 1], group_size=2)
  with jax.set_mesh(meshes.one()):
    rows = {wanted: dataclasses.replace(
        FREE, max_num_seqs=wanted).engine_settings(asked, 2).max_num_seqs
            for wanted in (0, 3, 4, 64)}
  assert rows == {0: 4, 3: 3, 4: 4, 64: 4}


@pytest.mark.parametrize("prompts,limits,message", [
    ([[6], []], Limits(max_tokens=9), "Prompt 1 has 0 tokens, and rollout.max"),
    ([[6] * 9], Limits(max_tokens=9), "has 9 tokens.*allows 1 to 8"),
    ([[V]], Limits(max_tokens=9), "outside of 0 to 12"),
    ([[-1]], Limits(max_tokens=9), "outside of 0 to 12"),
    ([[6]], Limits(max_tokens=30, max_thinking_tokens=4,
                   min_thinking_tokens=5),
     "min_thinking_tokens: 5 is above max_thinking_tokens=4."),
    ([[6]], Limits(max_tokens=9, max_thinking_tokens=4),
     "leaves no room for an answer: 4 thinking tokens and 5 to close them"),
])
def test_impossible_requests_are_errors(prompts, limits, message):
  mesh, model, _, _ = scene("tied", (1, 1))
  sampler = make_sampler(REPLACED, max_prompt_tokens=PROMPT, chunk=CHUNK)
  with jax.set_mesh(mesh), pytest.raises(ValueError, match=message):
    sampler.generate(model, prompts, limits, prompt_id=range(len(prompts)),
                     seed=0, stage="x")


def test_a_budget_without_thinking_is_an_error():
  mesh, model, _, _ = scene("tied", (1, 1))
  sampler = make_sampler(UNUSED, max_prompt_tokens=PROMPT, chunk=CHUNK)
  with jax.set_mesh(mesh), pytest.raises(ValueError, match=r"thinking\.end"):
    sampler.generate(model, [[6]], Limits(max_tokens=9, num_waits=1),
                     prompt_id=[0], seed=0, stage="x")
