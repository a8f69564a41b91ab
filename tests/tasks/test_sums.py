"""Oracles: Python's `eval`, and sets for the splits."""

import itertools

import pytest

from posttrain.tasks import sums


def expression(row):
  return row["prompt"].removeprefix("What is ").removesuffix("?")


@pytest.mark.parametrize("args", [
    {}, dict(high=99), dict(low=100, high=999, terms=3)])
def test_gold_and_answer(args):
  rows = sums.problems("train", 50, **args)
  assert len({row["id"] for row in rows}) == 50
  assert len({row["prompt"] for row in rows}) == 50
  for row in rows:
    assert eval(expression(row)) == int(row["answer"])
    assert sums.reward(**{**row, "completion": row["gold"]}) == 1.0
    assert sums.reward(**{**row, "completion": "It is 2."}) == (
        row["answer"] == "2")
    assert sums.reward(**{**row, "completion": "I do not know"}) == 0.0
    part = f"{row['answer']} or 1"
    assert sums.reward(**{**row, "completion": part}) == 0.0


def test_splits_share_no_multiset_and_hold_all_sums():
  counts, held = {}, {}
  for split in ("train", "validation", "test"):
    with pytest.raises(ValueError, match=r"sums has \d+") as error:
      sums.problems(split, 10**6)
    counts[split] = int(str(error.value).split()[2])
    rows = sums.problems(split, counts[split])
    held[split] = {tuple(sorted(expression(row).split(" + "))) for row in rows}
  assert sum(counts.values()) == 81
  for a, b in itertools.combinations(held, 2):
    assert not held[a] & held[b]


@pytest.mark.parametrize("high", [30, 999])  # Listed, and drawn.
def test_a_count_is_a_prefix_and_an_id_stable(high):
  rows = sums.problems("test", 60, high=high)
  assert sums.problems("test", 20, high=high) == rows[:20]
  other = sums.problems("test", 60, high=high, seed=1)
  assert other != rows
  by_prompt = {row["prompt"]: row["id"] for row in rows}
  for row in other:
    assert by_prompt.get(row["prompt"], row["id"]) == row["id"]


@pytest.mark.parametrize("args, message", [
    (dict(split="dev"), "train, validation, test"),
    (dict(count=0), "args.count=0"),
    (dict(low=5, high=5), "args.low=5"),
    (dict(high=10**6), "args.high=1000000"),
    (dict(prompt="2 + 2?"), "args.prompt='2")])
def test_errors_name_the_argument(args, message):
  with pytest.raises(ValueError, match=message):
    sums.problems(**{"split": "test", "count": 5, **args})
