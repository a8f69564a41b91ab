"""Worked votes: samples that write what they are told to."""

import dataclasses
import functools

import jax
import pytest

from posttrain.episodes import rollouts
from posttrain.episodes.calls import Calls
from posttrain.episodes.driver import Driver
from posttrain.episodes.protocol import is_multi_turn
from posttrain.episodes.self_consistency import self_consistency
from tests import meshes
from tests.episodes import scene
from tests.episodes.test_calculator import script_of

pytestmark = pytest.mark.usefixtures("one_device")


@pytest.fixture(scope="module")
def engine():
  with jax.set_mesh(meshes.one()):
    return scene.make_engine()


def last_digit(text):
  """The last word, if it is a digit."""
  words = text.split()
  if words[-1:] == ["error"]:
    raise KeyError(text)
  return words[-1] if words and words[-1].isdigit() else None


EXTRACT = "tests.episodes.test_self_consistency:last_digit"


@pytest.mark.parametrize("texts, answer", [
    (["so 6", "is 4", "then 4"], "is 4"),
    (["so 6", "is 4"], "so 6"),  # The first of those with as many votes.
    (["no", "so 4", "no", "is 6", "no", "and 6"], "is 6"),  # No vote for "no".
    (["no", "so"], "no"),
    (["so error", "is 4"], "is 4"),  # The extractor raises.
    (["so 6"], "so 6")])
def test_the_majority_answers(engine, texts, answer):
  scripts = [script_of(scene.TOKENIZER, text + "</s>") for text in texts]
  ids = []

  def make_request(task, sample_id):
    ids.append(sample_id)
    return dataclasses.replace(scene.REQUEST, script=scripts[len(ids) - 1])

  pool = scene.Pool(lambda number: -number % 3)
  [found] = Driver(engine, make_request, Calls(pool)).run(
      scene.make_tasks(["so is"]), functools.partial(
          self_consistency, samples=len(texts), extract=EXTRACT))
  assert found.outcome.reason == "completed" and found.answer == answer
  assert [turn.answer for turn in found.turns] == texts
  assert len(set(ids)) == len(texts) == len(found.calls)
  assert not is_multi_turn(self_consistency)  # Nothing goes on from a turn.


def test_samples_are_drawn_each_with_its_own_noise(engine):
  [found] = scene.make_driver(engine, scene.Pool()).run(
      scene.make_tasks(["so is"]), functools.partial(
          self_consistency, samples=8, extract=EXTRACT))
  assert len({turn.text for turn in found.turns}) == 8
  # The last sample has an id of its own; the row has the episode's.
  row = rollouts.of_trajectories([found], branched=True)
  assert row.completion(0) == found.turns[7].completion.tokens
  assert row.sample_id.tolist() == [0] != [
      found.turns[7].completion.request.sample_id]
