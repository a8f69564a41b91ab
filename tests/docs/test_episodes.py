"""docs/episodes.md is run: its file and its command, and what they did.

Oracle: the reward of the task, called again on the saved texts.
"""

import functools
import json
import pathlib
import re
import shlex

import jax
import pytest

from posttrain import sharding
from posttrain.cli import main
from posttrain.episodes import protocol
from posttrain.tasks import signs
from tests import meshes
from tests.episodes import scene

ROOT = pathlib.Path(__file__).parents[2]
PAGE = (ROOT / "docs/episodes.md").read_text()
[(NAME, SOURCE)] = re.findall(
    r"`(my_\w+\.py)`[^`]*?```python\n(.*?)```", PAGE, re.S)
TRAIN, VOTE = (shlex.split(text.replace("\\\n", ""))
                   for text in re.findall(r"```sh\n(.*?)```", PAGE, re.S))


def test_the_episode_of_the_page_tries_again():
  """In a vocabulary that has none of its words."""
  names: dict = {}
  exec(SOURCE, names)
  assert protocol.is_multi_turn(names["second_try"])
  with jax.set_mesh(meshes.one()):
    engine = scene.make_engine(prefix_cache_tokens=4000)
    found = scene.make_driver(engine).run(
        scene.make_tasks(["so is", "yes go"]), functools.partial(
            names["second_try"], verifier="tests.docs.test_episodes:verifier"))
  assert [len(each.turns) for each in found] == [2, 1]
  assert [each.outcome.reason for each in found] == ["completed"] * 2
  said = scene.TOKENIZER.encode("NO <think>")
  assert found[0].turns[1].observation == tuple(said)


def verifier(prompt, completion, *, id):
  """Is content with the second problem's answers."""
  assert isinstance(prompt, str) and isinstance(completion, str)
  return id


@pytest.mark.slow
def test_the_commands_of_the_page(tmp_path, monkeypatch):
  (tmp_path / "configs").symlink_to(ROOT / "configs")
  (tmp_path / NAME).write_text(SOURCE)
  monkeypatch.chdir(tmp_path)
  one = meshes.one()
  monkeypatch.setattr(sharding, "make_mesh", lambda *sizes, **more: one)
  # No signal handler, and no devices of the config, in a test process.
  monkeypatch.setattr(main, "_start", lambda config: None)
  assert main.main(TRAIN[1:]) == 0
  rows = [json.loads(line) for path in sorted(
      tmp_path.glob("runs/second_try/reason/rollouts/*.jsonl"))
          for line in path.read_text().splitlines()]
  problems = {row["id"]: row for row in signs.problems("train")}
  assert len(rows) == 16  # Of one batch.
  for row in rows:
    columns = {name: problems[row["prompt_id"]][name]
               for name in ("numbers", "target")}
    first, second = row["turns"]
    # The prompt opens a thinking section; without its end there is no answer.
    _, ended, answer = first["text"].partition("</think>")
    assert signs.reward("", answer if ended else "", **columns) == 0
    assert (first["parent"], second["parent"]) == (None, 0)
    assert [text.strip() for text, kind in row["segments"]
            if kind == "observation"] == ["NO <think>"]
    assert row["rewards"]["reward"] == signs.reward(
        "", row["answer_text"], **columns)
    assert row["length"] == first["length"] + second["length"]
  assert main.main(VOTE[1:]) == 0
  result = json.loads(
      (tmp_path / "runs/votes/measure/eval/init.json").read_text())
  assert len(result["records"]) == 8 * len(result["cells"]) > 8
  for row in result["records"]:
    assert row["num_turns"] == len(row["calls"]) == 8
    assert row["sample_id"] == 0
    votes = [value for value, _, _ in (
        call["value"] for call in row["calls"]) if value is not None]
    # A vote by hand: the first of the most frequent answers.
    assert row["answer"] == (max(votes, key=votes.count) if votes else None)
