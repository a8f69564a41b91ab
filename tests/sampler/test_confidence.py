"""Oracles: DeepConf's worked values, and accounts over full logits in NumPy."""

import ast
import dataclasses
import functools
import inspect
import json
import pathlib
import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from posttrain import sharding
from posttrain.sampler import (
  budget_state,
  confidence,
  continuations,
  decode,
  rollouts,
)
from posttrain.sampler.confidence import Confidence
from posttrain.sampler.requests import Request
from tests import meshes
from tests.model import numpy_transformer
from tests.sampler import engine_scene as scene

DEEPCONF = json.loads((
    pathlib.Path(__file__).parents[1] / "data/deepconf.json").read_text())
SETTINGS = Confidence(top_k=5, window=4)
# Nats, between float32 and the NumPy transformer's float64.
NEAR = 5e-5


@pytest.fixture(autouse=True)
def one_device():
  with jax.set_mesh(meshes.one()):
    yield


def entropy_of(logits: np.ndarray) -> np.ndarray:
  """[n, V] -> [n], from the definition, in float64."""
  p = np.exp(numpy_transformer.log_softmax(logits.astype(np.float64)))
  return -(p * np.log(p)).sum(-1)


def confidence_of(logits: np.ndarray, top_k: int) -> np.ndarray:
  """[n, V] -> [n], from the definition, in float64."""
  logprobs = numpy_transformer.log_softmax(logits.astype(np.float64))
  return -np.sort(logprobs)[:, -top_k:].mean(-1)


def told(values: list[float], window: int) -> dict[str, float]:
  """Running confidence of a list of tokens, in plain Python; NaN of none."""
  full = [np.mean(values[i:i + window])
          for i in range(len(values) - window + 1)]
  return {"mean_confidence": np.mean(values) if values else np.nan,
          "group": full[-1] if full else np.nan,
          "lowest_group": min(full) if full else np.nan}


def by_row(values: np.ndarray) -> jax.Array:
  return sharding.put(values, "rows")


def run(values, settings: Confidence, retracted: int = 0):
  """Yields the running values of one row behind each of its tokens."""
  zeros = by_row(np.zeros(2, np.int32))
  running = confidence.init(settings, zeros, retracted)
  for value in values:
    pair = by_row(np.full(2, value, np.float32))
    running = confidence.update(running, pair, pair, zeros == 0, zeros)
    yield running


# The definitions.


def test_worked_values():
  values, found = DEEPCONF["conf"], {}
  for window in (2, 3):
    groups = confidence.groups(np.array(values, np.float32), window)
    np.testing.assert_allclose(groups, DEEPCONF[f"window{window}"], atol=1e-6)
    found[window] = confidence.summary(
        np.ones(7), np.array(values, np.float32), window)
  assert found[3]["lowest_group_confidence"] == DEEPCONF["lowest_group_w3"]
  assert found[2]["tail_confidence"] == DEEPCONF["tail_2"]
  for summary in found.values():
    np.testing.assert_allclose(
        summary["mean_confidence"], DEEPCONF["mean"], atol=1e-6)
  np.testing.assert_allclose(
      confidence.groups(np.array(values), 10), DEEPCONF["short_trace_w10"],
      atol=1e-6)


def test_worked_values_of_running_groups():
  steps = list(run(DEEPCONF["conf"], Confidence(window=3)))
  groups = [float(running.group[0]) for running in steps]
  np.testing.assert_allclose(
      groups, [np.nan, np.nan, *DEEPCONF["window3"]], rtol=1e-6)
  np.testing.assert_allclose(
      steps[-1].lowest_group, DEEPCONF["lowest_group_w3"], rtol=1e-6)
  np.testing.assert_allclose(
      steps[-1].mean_confidence, DEEPCONF["mean"], rtol=1e-6)
  # Tokens are counted from 1 there.
  fell = [bool(running.lowest_group[0] < 7) for running in steps]
  assert fell.index(True) + 1 == DEEPCONF["online_stop_token_w3_bar_7"]
  # A trace shorter than the window has no group that could be below a bar.
  *_, last = run(DEEPCONF["conf"], Confidence(window=10))
  assert np.isnan(last.group).all() and np.isnan(last.lowest_group).all()


def test_the_confidence_of_the_worked_example():
  example = DEEPCONF["token_conf_example"]
  top = np.array(example["top_logprobs"])
  # Rounded as they are, their mass is a little above 1.
  above = np.log(np.exp(top).sum())
  assert 0 < above < 0.01
  for shift in (0.0, 7.5):
    _, found = confidence.measure(
        jnp.asarray(top + shift, jnp.float32)[None], len(top))
    np.testing.assert_allclose(found, example["conf"] + above, rtol=1e-6)


def test_uniform_and_certain_distributions():
  size = 257
  entropy, found = confidence.measure(jnp.full((2, size), 3.0), 20)
  np.testing.assert_allclose(entropy, np.log(size), rtol=1e-6)
  np.testing.assert_allclose(found, np.log(size), rtol=1e-6)
  certain = jnp.where(jnp.arange(size) == 7, 60.0, 0.0)[None]
  entropy, found = confidence.measure(certain, 20)
  np.testing.assert_allclose(entropy, 0, atol=1e-5)
  np.testing.assert_allclose(found, 19 * 60 / 20, rtol=1e-6)


@pytest.mark.parametrize("scale", [0.1, 3.0, 20.0])
def test_random_distributions(scale):
  rng = np.random.default_rng(0)
  logits = (scale * rng.normal(size=(64, 500))).astype(np.float32)
  for top_k in (1, 20, 500):
    entropy, found = confidence.measure(jnp.asarray(logits), top_k)
    np.testing.assert_allclose(entropy, entropy_of(logits), atol=2e-5)
    np.testing.assert_allclose(
        found, confidence_of(logits, top_k), rtol=1e-6, atol=1e-5)


def test_summaries_of_completions_without_tokens():
  nothing = np.zeros(0, np.float32)
  assert set(confidence.summary(nothing, nothing, 4).values()) == {None}


# The running values, with retractions.


@pytest.mark.parametrize("window,most", [(1, 1), (4, 0), (4, 3), (3, 7)])
def test_running_values_are_those_of_the_tokens_that_stay(window, most):
  """Random rows: tokens are sampled or forced, and up to `most` retracted."""
  rows, rng = 8, np.random.default_rng(window * 10 + most)
  update = jax.jit(confidence.update)
  running = confidence.init(
      Confidence(window=window), by_row(np.zeros(rows, np.int32)), most)
  kept = [[] for _ in range(rows)]
  since = np.zeros(rows, int)  # Sampled since the last token that stays.
  dropped_ever = 0
  for _ in range(60):
    values = rng.uniform(0.5, 20, (rows, 2)).astype(np.float32)
    sampled = rng.random(rows) < 0.8
    dropped = np.where(
        rng.random(rows) < 0.25, rng.integers(0, most + 1, rows), 0)
    dropped = np.minimum(dropped, since)
    sampled &= dropped == 0
    running = update(running, *map(by_row, (
        values[:, 0], values[:, 1], sampled, dropped.astype(np.int32))))
    for row, tokens in enumerate(kept):
      del tokens[len(tokens) - dropped[row]:]
      if sampled[row]:
        tokens.append(values[row])
    # As in the loop: no match reaches across a retraction or a forced token.
    since = np.where(sampled, since + 1, 0)
    dropped_ever += dropped.sum()
    for row, tokens in enumerate(kept):
      assert running.count[row] == len(tokens)
      want = told([token[1] for token in tokens], window)
      want["mean_entropy"] = np.mean(
          [token[0] for token in tokens]) if tokens else np.nan
      for name, value in want.items():
        np.testing.assert_allclose(
            getattr(running, name)[row], value, rtol=2e-6, err_msg=name)
  assert dropped_ever > 25 or most == 0


def test_a_mean_over_many_tokens_loses_no_precision():
  """As a float32 sum it would be off by about 1e-4."""
  rng = np.random.default_rng(0)
  values = rng.uniform(5, 15, 40_000).astype(np.float32)
  zeros = by_row(np.zeros(2, np.int32))

  def body(running, value):
    pair = zeros + value
    return confidence.update(running, pair, pair, zeros == 0, zeros), None

  running, _ = jax.lax.scan(
      body, confidence.init(Confidence(window=64), zeros, 1), values)
  np.testing.assert_allclose(
      running.mean_confidence, values.astype(np.float64).mean(), rtol=1e-5)
  np.testing.assert_allclose(
      running.lowest_group, confidence.groups(values, 64).min(), rtol=1e-6)


# The engine.


def asked(count: int = 12) -> list[Request]:
  """Requests of all kinds; every second one chooses to end its thinking.

  It does so at random steps, and with the delimiter of two tokens.
  """
  rng = np.random.default_rng(5)
  found = []
  for number in range(count):
    request = scene.random_request(rng, number)
    if number % 2:
      script = np.full(80, -1, np.int32)
      for step in rng.permutation(range(2, 60, 5))[:5]:
        script[step:step + 2] = 10, 11
      request = dataclasses.replace(
          request, prompt=(*request.prompt, 3), max_tokens=60, num_waits=3,
          max_thinking_tokens=-1, truncate=False, script=script)
    found.append(request)
  return found


@functools.cache
def completions(chunk: int = 8, max_num_seqs: int = 4, **changes):
  engine = scene.make_engine(
      chunk=chunk, max_num_seqs=max_num_seqs, confidence=SETTINGS, **changes)
  return scene.take(engine, asked())


def logits_of(done) -> np.ndarray:
  """[n, V], teacher-forced: those that each token was drawn from."""
  prompt = list(done.request.prompt)
  return numpy_transformer.logits(
      scene.params(), scene.CONFIG, prompt + done.tokens)[len(prompt) - 1:-1]


def sampled(done) -> np.ndarray:
  return done.provenance == budget_state.SAMPLED


def test_completions_have_the_values_of_the_full_logits():
  """Of greedy and truncated rows, and of forced tokens, too."""
  found = completions()
  assert sum(done.wait_count for done in found) > 5
  assert any((~sampled(done)).any() for done in found)
  for done in found:
    assert done.entropy.dtype == done.confidence.dtype == np.float32
    assert done.entropy.shape == done.confidence.shape == (len(done.tokens),)
    logits = logits_of(done)
    np.testing.assert_allclose(
        done.entropy, entropy_of(logits), atol=NEAR)
    np.testing.assert_allclose(
        done.confidence, confidence_of(logits, 5), atol=NEAR)


def test_the_state_has_the_values_of_the_completions():
  """Tokens that were retracted for a wait are not among them."""
  dropped = 0
  for part in np.split(np.arange(12), 3):
    engine = scene.make_engine(confidence=SETTINGS)
    requests = [asked()[i] for i in part]
    found = scene.take(engine, requests)
    running = engine._batch.carry.state.running
    for row, done in enumerate(found):
      values = done.confidence[sampled(done)].tolist()
      assert running.count[row] == len(values)
      want = told(values, 4) | {
          "mean_entropy": np.mean(done.entropy[sampled(done)])}
      for name, value in want.items():
        np.testing.assert_allclose(
            getattr(running, name)[row], value, rtol=2e-6, err_msg=name)
      choices = np.sum(done.raw >= 0)
      dropped += choices - len(values) - done.wait_count
  # Delimiters of two tokens were taken back, besides those of one.
  assert dropped > 3


@pytest.mark.parametrize("changes", [
    dict(chunk=3, max_num_seqs=1),
    dict(chunk=32, max_num_seqs=12, min_seq_len=128)], ids=str)
def test_no_schedule_changes_a_value(changes):
  """Also where a row is given to one request after the other."""
  for done, want in zip(completions(**changes), completions(), strict=True):
    if scene.flips(done, want):
      continue
    np.testing.assert_allclose(done.entropy, want.entropy, atol=NEAR)
    np.testing.assert_allclose(done.confidence, want.confidence, atol=NEAR)


def test_a_new_request_begins_afresh():
  """Through one row: its count is that of its last request alone."""
  engine = scene.make_engine(max_num_seqs=1, confidence=SETTINGS)
  *_, last = scene.take(engine, asked(5))
  running = engine._batch.carry.state.running
  values = last.confidence[sampled(last)].tolist()
  assert running.count[0] == len(values)
  for name, value in told(values, 4).items():
    np.testing.assert_allclose(getattr(running, name)[0], value, rtol=2e-6)


def test_a_continuation_begins_afresh():
  """Its values are of its own tokens; those are as in one long row."""
  plain = Request(prompt=(12, 13), max_tokens=20, prompt_id=3)
  [whole] = scene.take(
      scene.make_engine(scene.UNUSED, confidence=SETTINGS), [plain])
  engine = scene.make_engine(
      scene.UNUSED, confidence=SETTINGS, prefix_cache_tokens=500)
  [first] = scene.take(
      engine, [dataclasses.replace(plain, max_tokens=9, keep=True)])
  [second] = scene.take(
      engine, [continuations.continuation(first, max_tokens=11, keep=False)])
  assert first.tokens + second.tokens == whole.tokens
  np.testing.assert_allclose(
      np.concatenate([first.confidence, second.confidence]), whole.confidence,
      atol=NEAR)
  np.testing.assert_allclose(
      np.concatenate([first.entropy, second.entropy]), whole.entropy,
      atol=NEAR)
  running = engine._batch.carry.state.running
  assert running.count[0] == len(second.tokens)
  for name, value in told(second.confidence.tolist(), 4).items():
    np.testing.assert_allclose(getattr(running, name)[0], value, rtol=2e-6)


def test_a_replay_has_the_same_bits():
  engine = scene.make_engine(confidence=SETTINGS)
  replayed = scene.take(engine, [
      dataclasses.replace(done.request, script=done.raw)
      for done in completions()])
  for done, want in zip(replayed, completions(), strict=True):
    np.testing.assert_array_equal(done.entropy, want.entropy)
    np.testing.assert_array_equal(done.confidence, want.confidence)


@pytest.mark.parametrize("mesh", [
    meshes.eight, pytest.param(meshes.with_context, marks=pytest.mark.slow)])
def test_meshes_agree(mesh):
  with jax.set_mesh(mesh()):
    found = scene.take(scene.make_engine(
        max_num_seqs=8, prefill_rows=8, min_seq_len=128, confidence=SETTINGS),
                       asked())
  for done, want in zip(found, completions(), strict=True):
    if scene.flips(done, want):
      continue
    np.testing.assert_allclose(done.entropy, want.entropy, atol=NEAR)
    np.testing.assert_allclose(done.confidence, want.confidence, atol=NEAR)


def test_rollouts_pad_the_values():
  found = completions()
  rows = rollouts.of_completions(found)
  assert rows.entropy.dtype == rows.confidence.dtype == np.float32
  assert rows.entropy.shape == rows.confidence.shape == rows.tokens.shape
  for row, done in enumerate(found):
    np.testing.assert_array_equal(
        rows.confidence[row, :len(done.tokens)], done.confidence)
    assert not rows.entropy[row, len(done.tokens):].any()
  off = rollouts.of_completions(scene.take(scene.make_engine(), asked(2)))
  assert off.entropy is None and off.confidence is None


# No cost where it is off.


def without_the_feature() -> types.ModuleType:
  """The module of the decode loop, its branches on running values cut out."""
  class Cut(ast.NodeTransformer):
    cut = 0

    def visit_If(self, node):
      if "running" in ast.unparse(node.test):
        self.cut += 1
        return None
      return self.generic_visit(node)

  cutter = Cut()
  tree = cutter.visit(ast.parse(inspect.getsource(decode)))
  assert cutter.cut == 2
  module = types.ModuleType("decode_without")
  exec(compile(tree, decode.__file__, "exec"), module.__dict__)
  return module


def lowered(module, settings: Confidence | None):
  """The loop of an engine's batch, lowered by this module."""
  engine = scene.make_engine(confidence=settings)
  engine.submit(asked(1)[0])
  engine._admit()
  batch = engine._batch
  script = sharding.put(np.full((4, 8), -1, np.int32), "rows", "slots")
  return module.decode.lower(
      engine.model, engine._blocks, batch.carry, batch._rows, script,
      np.int32(4), engine.tables, steps=8, recorded=batch.settings.recorded)


def test_off_it_leaves_no_trace_in_the_program():
  off, never = lowered(decode, None), lowered(without_the_feature(), None)
  assert off.as_text() == never.as_text()
  assert off.compile().cost_analysis() == never.compile().cost_analysis()
  on = lowered(decode, SETTINGS)
  # XLA takes the top-k as such: a sort would cost as much as the whole step.
  sorts = [len(re.findall(r"= \S+ sort\(", program.compile().as_text()))
           for program in (off, on)]
  assert sorts[0] == sorts[1]
  # The comparison would see it.
  assert on.as_text() != off.as_text()
  assert on.compile().cost_analysis()["flops"] > (
      off.compile().cost_analysis()["flops"])


# Budget schedules, and mistakes.


def test_a_lowered_maximum_of_tokens_ends_a_row():
  """At the token behind the first window below the bar."""
  bar = 2.1

  def end(budgets, state):
    fell = state.confidence.lowest_group < bar
    return dataclasses.replace(
        budgets, max_tokens=jnp.where(fell, 0, budgets.max_tokens))

  requests = [Request(prompt=(12, 3), max_tokens=40, prompt_id=i)
              for i in range(8)]
  free = scene.take(scene.make_engine(confidence=SETTINGS), requests)
  ended = scene.take(scene.make_engine(
      confidence=SETTINGS, budget_schedule=end), requests)
  stopped = 0
  for done, want in zip(ended, free, strict=True):
    at = np.flatnonzero(sampled(want))
    below = np.flatnonzero(
        confidence.groups(want.confidence[sampled(want)], 4) < bar)
    # A window ends three tokens behind its first.
    length = at[below[0] + 3] + 2 if below.size else len(want.tokens)
    length = min(length, len(want.tokens))
    assert done.tokens == want.tokens[:length]
    if length < len(want.tokens):
      stopped += 1
      assert done.finish_reason == "length"
  assert stopped > 2


def test_a_schedule_that_reads_what_is_off_is_told_so():
  def reads(budgets, state):
    return dataclasses.replace(budgets, max_tokens=state.confidence.count)

  engine = scene.make_engine(budget_schedule=reads)
  engine.submit(asked(1)[0])
  with pytest.raises(ValueError, match=r"rollout\.confidence_window"):
    list(engine.results())


def test_more_logprobs_than_tokens_are_refused():
  engine = scene.make_engine(confidence=Confidence(top_k=scene.V + 1))
  engine.submit(asked(1)[0])
  with pytest.raises(ValueError, match=r"confidence averages 32.* has 31"):
    list(engine.results())


@pytest.mark.parametrize("name", ["top_k", "window"])
def test_settings_are_positive(name):
  with pytest.raises(ValueError, match=f"{name} is 0 .*confidence_{name}"):
    Confidence(**{name: 0})
