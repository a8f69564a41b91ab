"""A batch that was left and begun again: the same calls give the same results.

Calls give random numbers after a random time, so that no two runs are alike but
by the journal.
"""

import contextlib
import dataclasses
import json
import os
import random

import jax
import numpy as np
import pytest

from posttrain.episodes.calls import Calls
from posttrain.episodes.driver import Driver
from posttrain.episodes.journal import Journal
from posttrain.episodes.protocol import Call, Gather, Generate, Outcome
from tests import meshes
from tests.episodes import scene

HERE = "tests.episodes.test_replay"


@pytest.fixture(autouse=True)
def on_one_device():
  with jax.set_mesh(meshes.one()):
    yield


def make_engine():
  """Of one size of the cache, and so of few programs."""
  return scene.make_engine(
      max_seq_len=96, min_seq_len=96, prefill_chunk=96)


class Killed(Exception):
  """Stands for SIGKILL."""


def by_chance(text):
  return [random.random(), str(text)]


def by_chance_together(texts):
  return [random.random() for _ in texts]


def fails(text):
  raise ValueError(text)


def episode(task):
  """Asks with a number that nobody knows, as often as a number says."""
  turn = yield Generate(task.prompt)
  while True:
    result = yield Call(f"{HERE}:by_chance", (turn.text,))
    number = result.value[0]
    if number < 0.4 or turn.number == 3:
      break
    turn = yield Generate(task.encode(str(int(10 * number)), turn), parent=turn)
  yield [Call(f"{HERE}:fails", (turn.text,)),
         Call(f"{HERE}:by_chance", kwargs={"text": {1, 2}})]
  # It cannot be made: no journal has it.
  yield Call(f"{HERE}:by_chance", gather=Gather(["no hash"], 2))
  return Outcome(rewards={turn.number: number})


def score(trajectory):
  group = Gather(("group", trajectory.prompt_id), 2)
  return [("own", Call(f"{HERE}:by_chance", (trajectory.answer,))),
          ("group", Call(f"{HERE}:by_chance_together", (trajectory.answer,),
                         gather=group))]


class Pool(scene.Pool):
  """Leaves at one of its polls."""

  def __init__(self, polls=10**9):
    super().__init__(lambda number: random.randrange(4))
    self._polls = polls

  def poll(self, timeout=0.0):
    self._polls -= 1
    if self._polls < 0:
      raise Killed
    return super().poll(timeout)


def run(path, polls=10**9, prompts=("1 2 3", "4", "5 6"), made_with=0):
  """Trajectories, None where it was left, and the pool."""
  pool, said = Pool(polls), []
  journal = Journal(path, {"made_with": made_with}, say=said.append)
  calls = Calls(pool)
  driver = Driver(
      make_engine(),
      lambda task, sample_id: dataclasses.replace(
          scene.REQUEST, max_tokens=3 + 2 * task.prompt_id), calls)
  found = None
  with contextlib.suppress(Killed), calls.recorded(journal):
    found = driver.run(
        scene.make_tasks(prompts, samples=2, max_tokens=40), episode,
        score=score)
  return found, pool, said


def facts(trajectories):
  """All there is to know, logprobs to the last bit; one kind is a set's."""
  return [
      (each.outcome, each.calls, each.scores, [
          (turn.completion.tokens, turn.completion.logprobs.tolist(),
           turn.completion.draws, turn.observation)
          for turn in each.turns]) for each in trajectories]


def told(path):
  """Results by their values, in the journal."""
  return set(path.read_text().partition("\n")[2].split("\n")) - {""}


@pytest.fixture
def path(tmp_path):
  random.seed(int.from_bytes(os.urandom(4)))
  return tmp_path / "journal"


def test_what_was_told_stays(path):
  """Left again and again, each time a few exchanges later."""
  found, made, polls = None, 0, 0
  while found is None:
    polls += random.randrange(1, 9)
    before = told(path) if path.exists() else set()
    found, pool, said = run(path, polls)
    made += len(pool.made)
    assert before <= told(path)
    assert all("not made again" in line for line in said)
  assert {each.outcome.reason for each in found} <= {
      "completed", "max_tokens", "context_overflow"}
  # Whole now: nothing is made again, and all is as it was, bit for bit.
  again, pool, _ = run(path)
  assert not pool.made
  assert facts(again) == facts(found)
  journal = path.read_text()
  for each in again:
    result = each.scores["own"]
    assert result.status == "ok" and json.dumps(result.value) in journal
  for each in again:
    refused = [call for call in each.calls if "unhashable" in call.reason]
    assert len(refused) == (each.outcome.reason == "completed")


def test_calls_of_other_tokens_are_made_again(path):
  """Up to where they differ, which is at once here: a prompt is another."""
  whole, _, _ = run(path)
  other, pool, said = run(path, prompts=("1 2 3", "4", "5 9"))
  assert any("are made again" in line for line in said)
  assert pool.made
  again, pool, _ = run(path, prompts=("1 2 3", "4", "5 9"))
  assert not pool.made and facts(again) == facts(other)
  assert facts(again) != facts(whole)


def test_a_journal_of_other_settings_counts_for_nothing(path):
  run(path)
  found, pool, said = run(path, made_with=1)
  assert len(pool.made) and "other settings" in said[0]
  again, pool, _ = run(path, made_with=1)
  assert not pool.made and facts(again) == facts(found)


def test_the_numbers_do_not_depend_on_the_time_of_a_call(path):
  """Where calls give what they are given: tokens are those of any schedule."""
  found = []
  for _ in range(2):
    driver = Driver(
        make_engine(),
        lambda task, sample_id: scene.REQUEST, Calls(Pool()))
    found.append(driver.run(scene.make_tasks(["1 2", "3", "4 5"]), twice))
  for a, b in zip(*found, strict=True):
    assert [turn.completion.tokens for turn in a.turns] == [
        turn.completion.tokens for turn in b.turns]
    for one, other in zip(a.turns, b.turns, strict=True):
      np.testing.assert_allclose(
          one.completion.logprobs, other.completion.logprobs, atol=5e-5)


def twice(task):
  turn = yield Generate(task.prompt)
  result = yield Call(f"{HERE}:by_chance", (turn.text,))
  turn = yield Generate(task.encode(result.value[1], turn), parent=turn)
  return Outcome()
