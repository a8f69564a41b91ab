"""Oracles: the same request alone, the sampler in NumPy, and replays."""

import contextlib
import dataclasses
import functools
import re

import jax
import numpy as np
import pytest

from posttrain.sampler import (
  decode,
  engine,
  prefill,
  rollouts,
  token_sampling,
)
from posttrain.sampler.requests import Request
from tests import meshes
from tests.model import build, numpy_transformer
from tests.sampler import engine_scene as scene
from tests.sampler import numpy_sampler


@pytest.fixture(autouse=True)
def one_device():
  with jax.set_mesh(meshes.one()):
    yield


def soak(count: int, max_num_seqs: int, abort_every: int) -> None:
  """Runs random requests through few rows; every result against a run alone."""
  rng = np.random.default_rng(count)
  asked = [scene.random_request(rng, i) for i in range(count)]
  busy = scene.make_engine(max_num_seqs=max_num_seqs)
  numbers = [busy.submit(request) for request in asked]
  unwanted = set(numbers[5::abort_every])
  results, looked = {}, 0
  for done in busy.results():
    results[done.id] = done
    # Aborted when some other request finishes, wherever it then is.
    if unwanted and len(results) % (abort_every // 2) == 0:
      busy.abort(min(unwanted))
      unwanted.discard(min(unwanted))
    looked += 1
  assert sorted(results) == numbers and looked == count
  alone = scene.make_engine(max_num_seqs=1)
  wanted = scene.take(alone, asked)
  tokens = flipped = aborted = 0
  for number, want in zip(numbers, wanted, strict=True):
    done = results[number]
    if done.finish_reason == "abort":
      aborted += 1
      want = dataclasses.replace(want, tokens=want.tokens[:len(done.tokens)])
      if done.tokens == want.tokens:
        continue
    flipped += scene.flips(done, want)
    tokens += len(done.tokens)
  print(f"{count} requests, {aborted} aborted, {flipped} flips in {tokens} "
        f"tokens; occupancy {busy.occupancy:.3f}")
  assert aborted > 0 and flipped <= 1 + tokens / 50_000
  assert busy.occupancy > 0.7


def test_an_error_before_a_chunk_leaves_the_engine_as_it_was():
  """SIGTERM raises one; the caller may also go on."""
  rng = np.random.default_rng(3)
  asked = [scene.random_request(rng, i) for i in range(9)]
  looks = []

  def before_chunk():
    looks.append(1)
    if len(looks) % 3 == 0:
      raise KeyboardInterrupt

  wanted = scene.take(scene.make_engine(), asked)
  busy, results = scene.make_engine(before_chunk=before_chunk), {}
  numbers = [busy.submit(request) for request in asked]
  while len(results) < len(asked):
    with contextlib.suppress(KeyboardInterrupt):
      for done in busy.results():
        results[done.id] = done
  assert len(looks) > 6
  assert len(looks) - busy.stats.host_syncs == len(looks) // 3
  assert [results[n].tokens for n in numbers] == [w.tokens for w in wanted]


def test_every_result_is_that_of_a_run_alone():
  soak(60, max_num_seqs=4, abort_every=10)


@pytest.mark.slow
def test_soak():
  soak(2000, max_num_seqs=16, abort_every=20)


def test_results_are_numpy():
  """Tokens, provenance, ends, counts and logprobs of a mixture."""
  rng = np.random.default_rng(1)
  asked = [scene.random_request(rng, i) for i in range(14)]
  ties = 0
  for done in scene.take(scene.make_engine(), asked):
    told, logprobs, near = scene.redrawn(done)
    assert done.tokens == told.tokens
    assert done.finish_reason == told.finish
    assert (done.think_length, done.wait_count) == (told.thinking, told.waits)
    np.testing.assert_allclose(
        done.logprobs, logprobs, rtol=0, atol=5e-5)
    ties += near
  assert ties <= 1


@pytest.mark.parametrize("change", [
    dict(chunk=3), dict(min_seq_len=128),
    dict(prefill_chunk=32, max_num_seqs=6),
    dict(admit_fraction=1.0, prefill_rows=1)], ids=str)
def test_another_schedule_gives_the_same_tokens(change):
  """Rings that go round, grow and shrink, against others."""
  rng = np.random.default_rng(2)
  asked = [scene.random_request(rng, i) for i in range(24)]
  one, other = scene.make_engine(), scene.make_engine(**change)
  flipped = sum(map(
      scene.flips, scene.take(one, asked), scene.take(other, asked)))
  print(f"{flipped} flips; {one.stats.steps} and {other.stats.steps} steps")
  assert flipped <= 1
  assert one.stats.steps > 2 * 32  # The ring went round.


def test_a_mesh_gives_the_same_tokens():
  rng = np.random.default_rng(3)
  prefix = tuple(rng.integers(12, scene.V, 11).tolist())
  asked = [scene.random_request(rng, i) for i in range(16)]
  asked = [dataclasses.replace(r, prompt=prefix + r.prompt) for r in asked]
  one = scene.take(scene.make_engine(), asked)
  with jax.set_mesh(meshes.eight()):
    eight = scene.take(
        scene.make_engine(max_num_seqs=8, min_seq_len=128), asked)
  assert sum(map(scene.flips, one, eight)) <= 1


def test_the_same_schedule_is_bitwise_equal_and_so_is_its_replay():
  """The replay has other noise: what it takes is what was drawn."""
  rng = np.random.default_rng(4)
  asked = [scene.random_request(rng, i) for i in range(12)]
  first = scene.take(scene.make_engine(), asked)
  again = scene.take(scene.make_engine(), asked)
  replay = scene.take(scene.make_engine(), [
      dataclasses.replace(r, seed=99, script=done.raw)
      for r, done in zip(asked, first, strict=True)])
  for runs in zip(first, again, replay, strict=True):
    for other in runs[1:]:
      assert other.tokens == runs[0].tokens
      np.testing.assert_array_equal(other.logprobs, runs[0].logprobs)
      np.testing.assert_array_equal(other.raw, runs[0].raw)
      assert other.finish_reason == runs[0].finish_reason
  other = scene.take(scene.make_engine(), [
      dataclasses.replace(r, seed=99) for r in asked])
  assert any(a.tokens != b.tokens for a, b in zip(first, other, strict=True))


def test_programs_are_counted_and_bounded():
  """Nothing about a request compiles; another cache bucket does."""
  lines = []
  busy = scene.make_engine(log=lines.append)
  rng = np.random.default_rng(5)
  scene.take(busy, [scene.random_request(rng, i) for i in range(20)])
  programs = dict(busy.stats.programs)
  assert len(lines) == len(programs) <= busy.most_programs
  sizes = {key[1] for key in programs if key[0] == "decode"}
  assert sizes <= {32, 64, 128} and len(sizes) > 1
  counted = dict(
      decode=decode.decode, prefill=prefill.feed, place=prefill.place,
      resize=decode.resize)
  total = lambda: sum(f._cache_size() for f in counted.values())
  before = total()
  scene.take(busy, [scene.random_request(rng, 100 + i) for i in range(20)])
  new = busy.stats.programs.keys() - programs.keys()
  assert total() - before == sum(key[0] in counted for key in new)
  assert len(busy.stats.programs) <= busy.most_programs
  print("\n".join(lines))


def test_a_prompt_is_prefilled_once_for_its_group_and_a_prefix_for_all():
  """To the token where prompts are prefilled one by one."""
  rng = np.random.default_rng(6)
  system = tuple(rng.integers(12, scene.V, 21).tolist())
  prompts = [system + tuple(rng.integers(12, scene.V, n).tolist())
             for n in (5, 9, 30)]
  asked = [Request(
      prompt=prompt, max_tokens=12, prompt_id=i, sample_id=sample)
           for i, prompt in enumerate(prompts) for sample in range(6)]
  make = functools.partial(scene.make_engine, min_seq_len=160)  # One ring.
  # A chunk of 128 has room for each prompt: sharing would save no pass.
  plain = make(prefill_chunk=128)
  # A budget of one slot keeps nothing.
  shared = make(prefill_rows=1, prefix_cache_tokens=1)
  pairs = make(max_num_seqs=18, prefix_cache_tokens=1)
  one, other, two = (
      scene.take(engine, asked) for engine in (plain, shared, pairs))
  assert plain.stats.prompt_tokens == 6 * sum(map(len, prompts))
  assert plain.stats.prefilled_tokens == sum(map(len, prompts))
  assert shared.stats.prefilled_tokens == 21 + 5 + 9 + 30
  # Two prompts go through the model side by side, and the third behind them.
  assert pairs.stats.prefilled_tokens == 2 * 21 + 5 + 9 + 30
  # Without a budget a cache has no room beyond a prompt, and a part of a chunk
  # is computed again rather than have one.
  least = make(prefill_rows=1)
  three = scene.take(least, asked)
  passes = lambda engine: engine._prefill.positions
  assert passes(least) == passes(shared) == 8 * (4 + 2 + 4)
  assert sum(map(scene.flips, one, three)) <= 1
  assert sum(map(scene.flips, one, other)) <= 1
  assert sum(map(scene.flips, one, two)) <= 1
  # Nothing stays behind an empty queue: what comes next is computed anew.
  assert not shared._prefill.cache.entries
  scene.take(shared, [Request(prompt=prompts[0], max_tokens=2)])
  assert shared.stats.prefilled_tokens == 2 * (21 + 5) + 9 + 30
  for done in other[::6]:
    told, logprobs, _ = scene.redrawn(done)
    assert told.tokens == done.tokens
    np.testing.assert_allclose(done.logprobs, logprobs, rtol=0, atol=5e-5)


def test_prompts_that_no_next_request_needs_are_prefilled_again():
  """Eight prompts in turn; with a budget for all of them none is."""
  prompts = [(12 + i, 20, 21) for i in range(8)]
  asked = [Request(prompt=p, max_tokens=4, prompt_id=i)
           for i, p in enumerate(prompts)]
  make = functools.partial(
      scene.make_engine, max_num_seqs=2, prefill_rows=1)
  in_turn, grouped, cached = make(), make(), make(prefix_cache_tokens=128)
  turns = scene.take(in_turn, [*asked, *asked])
  groups = scene.take(grouped, [r for r in asked for _ in range(2)])
  again = scene.take(cached, [*asked, *asked])
  assert grouped.stats.prefilled_tokens == 3 * 8
  assert in_turn.stats.prefilled_tokens == 3 * 16
  assert cached.stats.prefilled_tokens == 3 * 8
  assert cached.stats.evicted_tokens == 0
  for runs in zip(turns[:8], turns[8:], groups[::2], again[:8], again[8:],
                  strict=True):
    assert len({tuple(done.tokens) for done in runs}) == 1


def test_sequences_that_were_not_used_lately_are_evicted():
  busy = scene.make_engine(prefill_rows=1, prefix_cache_tokens=24)
  ask = lambda first: scene.take(busy, [Request(
      prompt=(first, *range(13, 21)), max_tokens=1)])
  # Each takes 24 slots: two chunks, and room for one more.
  for first, prefilled in ((15, 9), (15, 9), (16, 18), (15, 27)):
    ask(first)
    assert busy.stats.prefilled_tokens == prefilled
  assert busy.stats.evicted_tokens == 2 * 9


@pytest.mark.parametrize("option", build.quick_options("gemma", "experts"))
def test_logprobs_are_the_training_programs(option):
  """Long sequences behind a shared prefix, some of it forced, in few rows."""
  config = build.make_config(
      **(build.OPTIONS[option] | dict(vocab_size=scene.V)))
  weights = build.random_params(config)
  model = build.load(config, weights)
  busy = engine.Engine(model, scene.STRINGS.tables(), dataclasses.replace(
      scene.SETTINGS, max_num_seqs=3, max_seq_len=192, min_seq_len=96,
      prefill_rows=1))
  prefix = tuple(range(12, 29))
  asked = [Request(
      prompt=(*prefix, 12 + i, 3), prompt_id=i,
      max_tokens=140, max_thinking_tokens=100, min_thinking_tokens=60,
      num_waits=1) for i in range(16)]  # Of 8, some models force few tokens.
  found = scene.take(busy, asked)
  assert busy.stats.prefilled_tokens == len(prefix) + 2 * len(asked)
  tokens = np.zeros((len(asked), 192), int)
  for row, done in zip(tokens, found, strict=True):
    sequence = [*done.request.prompt, *done.tokens]
    row[:len(sequence)] = sequence
  order = np.broadcast_to(np.arange(192), tokens.shape)
  logits = build.full_logits(
      model, *build.put_rows(tokens, order, np.ones_like(tokens)))
  gaps, forced = [], 0
  for row, done in zip(np.asarray(logits, np.float64), found, strict=True):
    bans = numpy_sampler.retell(
        rollouts.of_completions([done]), 0, scene.STRINGS,
        scene.limits_of(done.request)).bans
    for i in range(len(done.tokens)):
      left = row[len(done.request.prompt) + i - 1].copy()
      if done.provenance[i] == 1:
        left[list(bans[i])] = -np.inf
      forced += done.provenance[i] == 2
      gaps.append(abs(done.logprobs[i] - numpy_transformer.log_softmax(
          left)[done.tokens[i]]))
  print(f"{len(gaps)} tokens, {forced} of them forced: max {max(gaps):.2g}, "
        f"mean {np.mean(gaps):.2g}")
  # The router's weights are quotients, which magnify what rounding leaves: of
  # 1,405 tokens the worst were seen at 5.5e-5, 4.2e-5 and 2.6e-5.
  assert max(gaps) < (1e-4 if config.num_experts else 5e-5)
  assert np.mean(gaps) < 1e-5 and len(gaps) > 400 and forced > 8


BAD = [
    (dict(prompt=()), "has no tokens"),
    (dict(prompt=(12,) * 120), "need 132 slots, and the cache has 128"),
    (dict(prompt=(scene.V,)), "outside of 0 to 30"),
    (dict(banned_ids=(-1,)), "outside of 0 to 30"),
    (dict(max_tokens=0), "max_tokens is 0"),
    (dict(stop_ids=(1, 2, 3, 4, 5)), "stop_ids has 5 ids.*max_ids"),
    (dict(wait_order=(0,) * 5), "wait_order has 5 ids.*max_waits"),
    (dict(stop_strings=("a", "")), "stop string is empty"),
    (dict(stop_strings=("a",)), "no tokenizer"),
    (dict(max_thinking_tokens=2, min_thinking_tokens=3),
     "min_thinking_tokens: 3 is above max_thinking_tokens=2."),
    (dict(max_thinking_tokens=8), "leaves no room for an answer"),
    (dict(max_thinking_steps=1), r"thinking\.step is empty"),
    (dict(seed=-1), "seed is -1"),
    (dict(prompt=[12, 13]), "prompt is a list, and must be a tuple"),
    (dict(sample_id=2**31), "sample_id is 2147483648 and must lie in -2"),
    (dict(prompt_id=np.int64(-2**40)), "prompt_id is -1099511627776"),
    (dict(min_thinking_tokens=2**33), "min_thinking_tokens is 8589934592"),
    (dict(params=token_sampling.SamplingParams(top_k=2**31)), "top_k is 214"),
]


def test_a_bad_request_errs_alone():
  good = Request(prompt=(12, 13), max_tokens=10)
  asked = [good]
  for change, _ in BAD:
    asked += [dataclasses.replace(good, **change), good]
  found = scene.take(scene.make_engine(), asked)
  for (_, message), done in zip(BAD, found[1::2], strict=True):
    assert done.finish_reason == "error" and done.tokens == []
    assert re.search(message, done.error), done.error
  for done in found[::2]:
    assert done.tokens == found[0].tokens and not done.error
