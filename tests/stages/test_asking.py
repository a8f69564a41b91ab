"""Cells that ask for an amount of thinking, steered; figures from the records.
"""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from posttrain import report
from posttrain.stages import evaluate, sampling
from posttrain.tasks import loading
from tests import meshes, pipeline_run

HOOK = "posttrain.sampler.logits_processors:token_bias"
POLICY = "tests.stages.test_asking:patience"
ASK = [
    "stages=measure", "tokenizer.train=tests.stages.toy:asking_corpus",
    "thinking.step=ball", "measure.max_thinking_tokens=",
    "measure.num_waits=", "measure.majority.max_samples=0",
    "measure.rollout.max_prompt_tokens=8", "measure.instructions.tokens=2,5",
    "measure.instructions.steps=1", "measure.instructions.classes=short,long",
    "measure.instructions.forced=true",
    "measure.instructions.token_text=ask {n} tokens",
    "measure.instructions.step_text=ask {n} steps",
    "measure.instructions.short_text=ask short",
    "measure.instructions.long_text=ask long"]
STEER = ["measure.rollout.suppress=Pong,yes",
         f"measure.rollout.logits_processor={HOOK}",
         f"measure.rollout.budget_schedule={POLICY}"]
FORCED = {"ask_tokens_2_forced": 2, "ask_tokens_5_forced": 5}


def patience(budgets, state):
  """Seven thinking tokens at most."""
  del state
  limit = budgets.max_thinking_tokens
  return dataclasses.replace(
      budgets, max_thinking_tokens=jnp.where(
          limit < 0, 7, jnp.minimum(limit, 7)))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
  """The pipeline, its result, and a word that the hook never lets be said."""
  path = tmp_path_factory.mktemp("asked")
  with jax.set_mesh(meshes.one()):
    words = pipeline_run.make_pipeline(
        tmp_path_factory.mktemp("words"), ASK).renderer.tokenizer
    [unsaid] = words.encode("no")
    run = pipeline_run.make_pipeline(path, [
        *ASK, *STEER,
        f"measure.rollout.logits_processor_args={{'{unsaid}': -1e9}}"])
    evaluate.run(pipeline_run.from_start(run, "measure"), None)
  result = json.loads((path / "measure/eval/init.json").read_text())
  return run, result


@pytest.fixture(scope="module")
def cells(run):
  return {figures["name"]: (figures, [
      r for r in run[1]["records"] if r["cell"] == figures["name"]])
          for figures in run[1]["cells"]}


def thought(record):
  """The words between the prompt's <think> and its end."""
  return record["completion"].partition("</think>")[0].split()


def test_a_cell_asks_for_what_it_is_named_after(cells):
  asked = {
      "free": "", "ask_tokens_2": "ask 2 tokens",
      "ask_tokens_5": "ask 5 tokens", "ask_steps_1": "ask 1 steps",
      "ask_tokens_2_forced": "ask 2 tokens",
      "ask_tokens_5_forced": "ask 5 tokens",
      "ask_steps_1_forced": "ask 1 steps", "ask_short": "ask short",
      "ask_long": "ask long"}
  assert list(cells) == list(asked)
  questions = [r["prompt"].removesuffix("<think>").strip()
               for r in cells["free"][1]]
  for name, (_, records) in cells.items():
    assert [r["prompt"].split() for r in records] == [
        f"{question} {asked[name]} <think>".split() for question in questions]


def test_what_is_forced_is_kept_and_what_is_asked_for_is_counted(cells):
  closed = 0
  for name, (figures, records) in cells.items():
    for record in records:
      words = thought(record)
      assert record["think_steps"] == words.count("ball")
      assert record["think_length"] <= FORCED.get(name, 7)
      if name == "ask_steps_1_forced":
        assert record["think_steps"] <= 1
        if record["think_steps"] and record["think_end"] == "budget":
          assert words[-1] == "ball"
          closed += 1
    spent = "think_steps" if "steps" in name else "think_length"
    if figures["amount"]:
      assert figures["control"] == np.mean(
          [r[spent] <= figures["amount"] for r in records])
    assert figures["mean_thinking_steps"] == pytest.approx(
        np.mean([r["think_steps"] for r in records]))
  assert closed


def test_control_is_told_by_family(run, cells):
  found = run[1]["summary"]["asking"]
  assert list(found) == ["tokens", "steps", "tokens_forced", "steps_forced",
                         "classes"]
  for name in ("tokens_forced", "steps_forced"):
    assert found[name]["control_per_sample"] == 1
    assert found[name]["control_per_run"] == 1
  assert found["tokens"]["control_per_sample"] == np.mean(
      [cells[f"ask_tokens_{n}"][0]["control"] for n in (2, 5)])
  short, free, long = (cells[name][0]["mean_thinking_tokens"]
                       for name in ("ask_short", "free", "ask_long"))
  assert found["classes"]["control_per_run"] == np.mean(
      [short < free, long > free])
  assert "control" not in cells["free"][0]


def test_the_page_and_the_plot_show_what_was_asked_for(run):
  """As marks of their own: the free cell stays the only one of its kind."""
  path = run[0].workdir.path
  report.build([path], path / "report.html")
  page = (path / "report.html").read_text()
  for name in ("asked for 5 tokens and forced", "asked for 1 steps",
               "asked for short thinking", "asked for steps, forced"):
    assert name in page
  assert report.figures([path]).count(", free: ") == 1
  drawn = (path / "measure/eval/curve.svg").read_text()
  for name in ("init, free", "asked for 5 tokens and forced",
               "asked for an amount", "and forced to it"):
    assert name in drawn


def test_every_cell_is_steered(run):
  """Suppressed words are left out of the thinking, and of nothing else."""
  answers = set()
  for record in run[1]["records"]:
    assert not {"pong", "yes"} & set(thought(record))
    said = {word for text, name in record["segments"] if name == "sampled"
            for word in text.split()}
    assert "no" not in said
    answers |= set(record["completion"].partition("</think>")[2].split())
  assert {"pong", "yes"} & answers
  decoding = run[1]["decoding"]
  assert decoding["suppress"] == ["Pong", "yes"]
  assert decoding["logits_processor"] == HOOK
  assert decoding["budget_schedule"] == POLICY


def test_the_sources_of_what_steers_are_recorded(run):
  [start] = run[0].workdir.environments()
  for name in (HOOK, POLICY):
    assert start["sources"][name] == loading.source_hash(name)


def test_words_that_cannot_be_read_are_not_asked(tmp_path):
  with jax.set_mesh(meshes.one()):
    run = pipeline_run.make_pipeline(
        tmp_path, ["stages=measure", "measure.instructions.classes=long"])
    with pytest.raises(ValueError, match="The instruction 'Answer after"):
      evaluate.check(run.context("measure"))


def test_a_function_that_makes_no_hook_is_named():
  with pytest.raises(ValueError, match=r"zeros returned a ndarray, and a log"):
    sampling.make_sampling_options(
        dict(sampling.PLAIN, logits_processor="numpy:zeros"), 9)
