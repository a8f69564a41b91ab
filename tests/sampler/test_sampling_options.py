"""Sampling options of a call, in continuous and in static batching.

Oracles: the same tokens both ways, and steps, words, waits and budgets counted
again in what came out.
"""

import dataclasses

import jax
import numpy as np
import pytest

from posttrain.sampler import logits_processors, requests
from posttrain.sampler.rollouts import THINK_ENDS
from posttrain.sampler.sampler import Limits
from posttrain.sampler.sampling_options import NONE, SamplingOptions
from tests import meshes
from tests.model import build
from tests.sampler import engine_scene as scene
from tests.sampler import numpy_sampler

ROWS = 24
WORDS = (16, 17, 18)
STRINGS = dataclasses.replace(
    scene.STRINGS, reflections=WORDS, more_waits=((12, 13), (14,)),
    step=(19,))


def half(budgets, state):
  """Asks for more tokens too, which a budget schedule cannot give."""
  del state
  return dataclasses.replace(
      budgets, max_thinking_tokens=budgets.max_thinking_tokens // 2,
      max_tokens=budgets.max_tokens + 50)


def five(budgets, state):
  """Thinking tokens at most."""
  del state
  return dataclasses.replace(
      budgets, max_thinking_tokens=budgets.max_thinking_tokens * 0 + 5)


ALL = SamplingOptions(
    suppress=True, draw_waits=True,
    logits_processor=logits_processors.token_bias(scene.V),
    logits_processor_args={"2": -1e9, "22": -1e9, "4": -1e9, "7": 2.0,
                           "19": 2.0},
    budget_schedule=half)


def run(limits, max_num_seqs=0, options=NONE, strings=STRINGS):
  """Twenty-four rows that think, of four prompts."""
  sampler = dataclasses.replace(
      numpy_sampler.make_sampler(
          strings, max_prompt_tokens=4, chunk=64, max_num_seqs=max_num_seqs),
      options=options)
  with jax.set_mesh(meshes.one()):
    return sampler.generate(
        build.load(scene.CONFIG, scene.params()),
        [[12 + i, 3] for i in range(4)], limits, prompt_id=range(4),
        group_size=6, seed=5, stage="x")


@pytest.fixture(scope="module")
def limits():
  """Even rows have a maximum of tokens, and every third one of steps."""
  rows = np.arange(ROWS)
  return Limits(
      max_tokens=50, num_waits=rows % 5,
      max_thinking_tokens=np.where(rows % 2, -1, rows + 10),
      max_thinking_steps=np.where(rows % 3, -1, rows % 4))


@pytest.fixture(scope="module")
def drawn(limits):
  return run(limits, options=ALL)


def thought(drawn, row):
  """Returns the sampled and the forced tokens of the thinking."""
  inside = slice(0, drawn.think_lengths[row])
  tokens = np.array(drawn.completion(row))[inside]
  forced = drawn.provenance[row, :len(tokens)] == 2
  return tokens[~forced].tolist(), tokens[forced].tolist()


def test_continuous_batching_draws_the_same(limits, drawn):
  again = run(limits, 5, ALL)
  same = [drawn.completion(row) == again.completion(row)
          for row in range(ROWS)]
  assert sum(same) >= ROWS - 1  # A near-tie at most.
  assert (drawn.lengths == 50).any() and (drawn.lengths <= 50).all()


def test_words_and_biases_are_every_rows(drawn):
  said = set()
  for row in range(ROWS):
    tokens = drawn.completion(row)
    assert not set(WORDS) & set(thought(drawn, row)[0])
    assert not {2, 22} & set(tokens)
    said |= set(tokens)
  assert set(WORDS) < said  # In answers.


def test_texts_of_waits_are_drawn_by_the_rows_ids(limits, drawn):
  texts = [STRINGS.wait, *STRINGS.more_waits]
  used = set()
  for row in range(ROWS):
    order = requests.drawn_waits(requests.Request(
        (1,), 1, seed=5, stage="x", prompt_id=row // 6, sample_id=row % 6),
        limits.num_waits[row], 3)
    order = order[:drawn.wait_count[row]]
    want = [token for i in order for token in texts[i]]
    forced = thought(drawn, row)[1]
    # The last may have been cut off by a maximum.
    assert forced == want[:len(forced)]
    assert len(want) - len(forced) < 2
    used |= set(order)
  assert used == {0, 1, 2}


def test_no_row_exceeds_the_schedules_maximum_or_its_own(limits, drawn):
  ends = {"tokens": 0, "steps": 0}
  for row in range(ROWS):
    sampled, forced = thought(drawn, row)
    most, steps = (int(column[row]) for column in (
        limits.max_thinking_tokens, limits.max_thinking_steps))
    counted = sum(token in STRINGS.step for token in sampled)
    assert drawn.think_steps[row] == counted
    assert steps < 0 or counted <= steps
    # The schedule has no say before the first token.
    assert most < 0 or len(sampled) + len(forced) <= max(most // 2, 1)
    if drawn.think_end[row] == 2:  # By a budget.
      by = "steps" if counted == steps else "tokens"
      assert by == "steps" or len(sampled) + len(forced) == most // 2
      ends[by] += 1
      closing = drawn.completion(row)[drawn.think_lengths[row]:][:4]
      assert closing == [1, 4, 5, 6][:len(closing)]
      assert drawn.finish_name(row) in ("budget", "length")
  assert min(ends.values()) > 2


def test_steps_need_what_ends_one():
  with pytest.raises(ValueError, match=r"thinking\.step is empty"):
    run(Limits(max_tokens=9, max_thinking_steps=1), strings=scene.STRINGS)


@pytest.mark.parametrize("maximum, options", [
    (dict(max_thinking_steps=2), SamplingOptions(
        logits_processor=logits_processors.token_bias(scene.V),
        logits_processor_args={"19": 3.0})),
    ({}, SamplingOptions(budget_schedule=five))],
    ids=["steps", "schedule"])
def test_truncation_needs_no_maximum_of_tokens(maximum, options):
  """A row ends at that of steps, or of a schedule, and nothing is closed."""
  cut = run(Limits(max_tokens=50, truncate=True, **maximum), 0, options)
  names = [THINK_ENDS[end] for end in cut.think_end]
  assert "budget" not in names
  rows = [row for row in range(ROWS) if names[row] == "open"
          and cut.lengths[row] < 50 and cut.finish_name(row) == "length"]
  assert len(rows) > ROWS / 4
  for row in rows:
    tokens, forced = thought(cut, row)
    assert not forced and tokens == cut.completion(row)
    steps = sum(token in STRINGS.step for token in tokens)
    assert steps == 2 if maximum else len(tokens) == 5
