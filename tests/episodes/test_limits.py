"""Episodes that outgrow the cache or their tokens, and runs that are ended."""

import jax
import numpy as np
import pytest

from posttrain.episodes.call import Call
from posttrain.episodes.protocol import Generate, Outcome
from tests import meshes
from tests.episodes import scene

pytestmark = pytest.mark.usefixtures("one_device")
SETTINGS = dict(max_seq_len=60, prefix_cache_tokens=4000)


@pytest.fixture(scope="module")
def engine():
  with jax.set_mesh(meshes.one()):
    return scene.make_engine(**SETTINGS)


def talk(task, observation="so", changes=None):
  turn = yield Generate(task.prompt, changes=changes or {})
  for _ in range(99):
    turn = yield Generate(
        task.encode(observation, turn), parent=turn, changes=changes or {})
  return Outcome()


def run(engine, episode, prompt="so is", max_tokens=1000, **changes):
  # Nothing stops a turn before its maximum.
  driver = scene.make_driver(engine, banned_ids=(1,), **changes)
  [found] = driver.run(
      scene.make_tasks([prompt], max_tokens=max_tokens), episode)
  return found


def behind(trajectory):
  """Tokens behind the prompt at the end of each turn."""
  return [len(turn.completion.kept) - len(trajectory.turns[0].observation)
          for turn in trajectory.turns]


def test_an_episode_ends_when_its_tokens_are_used_up(engine):
  """Observations count; the last turn is shortened to what is left."""
  found = run(engine, talk, max_tokens=40)
  assert found.outcome.reason == "max_tokens"
  assert behind(found) == [12, 25, 38, 40]
  assert [len(turn.completion.tokens) for turn in found.turns] == [
      12, 12, 12, 1]
  # With 39 no token fits behind the observation.
  found = run(engine, talk, max_tokens=39)
  assert found.outcome.reason == "max_tokens" and behind(found) == [12, 25, 38]
  assert "0 more tokens" in found.outcome.reason_text
  # The turn is the same as if it had been asked for with that maximum.
  found = run(engine, talk, max_tokens=7)
  assert behind(found) == [7]


def test_an_episode_that_outgrows_the_cache_has_a_status(engine):
  found = run(engine, talk, max_tokens=1000)
  assert found.outcome.reason == "context_overflow"
  # 60 places: the prompt has 2, and each observation 1.
  assert behind(found) == [12, 25, 38, 51, 58]
  assert [turn.finish_reason for turn in found.turns] == ["length"] * 5
  assert "leaves 0 of 60" in found.outcome.reason_text
  long = run(engine, talk, prompt=" ".join(["so"] * 60))
  assert long.outcome.reason == "context_overflow" and not long.turns
  assert long.answer == "" and long.chain() == []


def test_an_observation_may_be_longer_than_the_cache(engine):
  found = run(
      engine, lambda task: talk(task, " ".join(["so"] * 99)), max_tokens=1000)
  assert found.outcome.reason == "context_overflow" and len(found.turns) == 1


def test_a_mistaken_maximum_is_an_error_and_not_a_limit(engine):
  found = run(engine, lambda task: talk(task, changes={"max_tokens": 0}))
  assert found.outcome.reason == "error"
  assert "max_tokens is 0" in found.outcome.reason_text


class Stop(BaseException):
  pass


def hang(task):
  yield Generate(task.prompt)
  yield Call("builtins:len", ("x",))
  return Outcome()


def test_a_run_that_is_to_end_notices_it_while_a_call_hangs():
  """`before_chunk` is called though nothing decodes; the call is cancelled."""
  seen = []

  def before_chunk():
    seen.append(engine.busy)
    if seen.count(False) == 4:
      raise Stop

  engine = scene.make_engine(before_chunk=before_chunk)
  pool = scene.Pool(lambda number: 10**9)
  driver = scene.make_driver(engine, pool)
  with pytest.raises(Stop):
    driver.run(scene.make_tasks(["so is"]), hang)
  assert pool.cancelled and pool.made
  # It waits for the call in between, and not long.
  assert set(pool.waits) <= {0.0, 0.2} and pool.waits[-3:] == [0.2] * 3


def test_an_error_of_the_engine_ends_the_episode_with_its_text():
  config = scene.make_engine(weights=jax.tree.map(
      lambda x: np.full_like(x, np.nan), scene.engine_scene.params()))
  found = run(config, talk)
  assert found.outcome.reason == "error"
  assert "logits are not finite" in found.outcome.reason_text
  assert len(found.turns) == 1 and not found.turns[0].completion.tokens
