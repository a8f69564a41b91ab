"""Oracles: Python's own `eval` for the sums, sets for the splits."""

import itertools
import time

import pytest

from posttrain.tasks import signs
from posttrain.text import vocabulary

SPLITS = ("train", "validation", "test")


def columns(row):
  return {key: value for key, value in row.items() if key != "prompt"}


def score(row, completion):
  return signs.reward(row["prompt"], completion, **columns(row))


def multiset(row):
  return tuple(sorted(row["numbers"]))


def test_splits_share_no_multiset_and_are_large_enough():
  held = {split: {multiset(r) for r in signs.problems(split)}
          for split in SPLITS}
  for a, b in itertools.combinations(SPLITS, 2):
    assert not held[a] & held[b]
  assert sum(map(len, held.values())) == 210  # C(7 + 4 - 1, 4).
  for split in ("validation", "test"):
    rows = signs.problems(split, count=512)
    assert len({row["prompt"] for row in rows}) == 512
    assert len(held[split]) >= 23


def test_a_larger_range_keeps_the_split_of_a_multiset():
  small = {multiset(row) for row in signs.problems("test", high=6)}
  large = {multiset(row) for row in signs.problems("test", high=12)}
  assert small == {m for m in large if max(m) <= 6}


def test_ids_are_stable_and_unique():
  rows = signs.problems("test")
  by_prompt = {row["prompt"]: row["id"] for row in rows}
  assert len(set(by_prompt.values())) == len(rows)
  for row in signs.problems("test", count=100, seed=7):
    assert by_prompt[row["prompt"]] == row["id"]


def test_order_depends_on_the_seed_and_a_count_is_a_prefix():
  rows = signs.problems("test", count=50, seed=1)
  assert rows == signs.problems("test", seed=1)[:50]
  assert rows != signs.problems("test", count=50, seed=2)


def test_problems_are_all_and_only_the_solvable_ones():
  for row in signs.problems("validation", high=3):
    values = [eval("".join(itertools.chain(*zip(
        map(str, row["numbers"]), [*pattern, ""], strict=True))))
              for pattern in itertools.product("+-", repeat=3)]
    assert row["target"] in values
  expected = {(2, 1, value) for value in (1, 3)} | {
      (1, 2, value) for value in (-1, 3)} | {
      (1, 1, value) for value in (0, 2)} | {(2, 2, value) for value in (0, 4)}
  found = {(*row["numbers"], row["target"]) for split in SPLITS
           for row in signs.problems(split, high=2, terms=2)}
  assert found == expected


@pytest.mark.parametrize("split", SPLITS)
def test_every_gold_scores_one(split):
  for row in signs.problems(split, count=1000):
    assert score(row, row["gold"]) == 1.0


def test_reward_agrees_with_eval_on_every_answer():
  """All sign patterns and some near misses of each."""
  for row in signs.problems("test", count=40, seed=3):
    for pattern in itertools.product("+-", repeat=3):
      words = [str(row["numbers"][0])]
      for sign, number in zip(pattern, row["numbers"][1:], strict=True):
        words += [sign, str(number)]
      answer = " ".join(words)
      right = float(eval(answer) == row["target"])
      assert score(row, f" {answer}") == right
      assert score(row, f" {answer} </s>") == right
      assert score(row, f"{answer}</s>") == right
      for wrong in (f"{answer} Wait", f"{answer} + 0", f"0 + {answer}",
                    f"{answer} </think>", f"OK {answer}",
                    f"x OK </think> {answer}", f"{answer} </s> 1"):
        assert score(row, wrong) == 0.0


@pytest.mark.parametrize("completion", [
    "", "</think>", " </s>", "1 +", "1 + + 2", "-1 + 2", "1 2", "Wait"])
def test_what_is_no_answer(completion):
  assert signs.extract(completion) is None


def test_extract_is_canonical():
  assert signs.extract("  6 -  5 </s>") == "6 - 5"


def test_numbers_out_of_order_do_not_count():
  row = dict(prompt="1 2 3 : 6 <think>", numbers=[1, 2, 3], target=6)
  assert score(row, "1 + 2 + 3") == 1.0
  assert score(row, "3 + 2 + 1") == 0.0
  assert score(row, "1 + 5") == 0.0


def parse(completion):
  """(numbers, running values, verdict) of each attempt, and the answer."""
  thinking, answer = completion.split(" </think> ")
  attempts = []
  for attempt in thinking.split(" Wait "):
    *words, against, target, verdict = attempt.split()
    steps = " ".join(words).split(" = ")
    assert against == "vs"
    assert verdict == ("OK" if steps[-1] == target else "NO")
    attempts.append((steps, verdict))
  return attempts, answer


def test_demonstrations_are_true():
  """Each step's running value is right, and so is each verdict."""
  for row in signs.demonstrations("train", 300):
    target = int(row["prompt"].split()[-2])
    attempts, answer = parse(row["completion"])
    for steps, verdict in attempts:
      for before, after in itertools.pairwise(steps):
        assert eval(before) == int(after.split()[0])
      assert verdict == ("OK" if int(steps[-1]) == target else "NO")
    steps = attempts[-1][0]
    path = " ".join([steps[0]] + [
        step.split(" ", 1)[1] for step in steps[1:-1]])
    assert answer == path
    assert row["prompt"].split(" :")[0].split() == path.split()[::2]


def test_the_searcher_is_right_as_often_as_its_odds_say():
  rows = signs.demonstrations("train", 16000)
  right = sum(parse(row["completion"])[0][-1][1] == "OK" for row in rows)
  expected = sum(p * (1 - 0.8**k) for k, p in enumerate(signs.PATIENCE, 1))
  assert abs(right / 16000 - expected) < 4 * 0.5 / 16000**0.5


def test_a_searcher_that_is_always_right_makes_one_attempt():
  rows = signs.demonstrations("train", 200, right=1.0, recheck=0.0)
  for row in rows:
    attempts, _ = parse(row["completion"])
    assert [verdict for _, verdict in attempts] == ["OK"]
  rows = signs.demonstrations("train", 200, right=1.0, recheck=1.0)
  assert all(row["completion"].count("OK") == 2 for row in rows)


def test_without_repeats_no_wrong_attempt_comes_twice():
  for row in signs.demonstrations(
      "train", 500, repeat=0.0, recheck=0.0, patience=(0, 0, 0, 1)):
    attempts, _ = parse(row["completion"])
    wrong = [" ".join(steps) for steps, verdict in attempts if verdict == "NO"]
    assert len(set(wrong)) == len(wrong)


def test_demonstrations_are_a_prefix_and_fast():
  start = time.process_time()
  rows = signs.demonstrations("train", 16000)
  assert time.process_time() - start < 5
  assert signs.demonstrations("train", 100) == rows[:100]
  assert signs.demonstrations("train", 100, seed=1) != rows[:100]


def test_demonstrations_beyond_the_problems_repeat_them_with_other_traces():
  n = len(signs.problems("test", high=2))
  rows = signs.demonstrations("test", 3 * n, high=2)
  for lap in range(3):
    part = rows[lap * n:(lap + 1) * n]
    assert len({row["prompt"] for row in part}) == n


@pytest.mark.parametrize("high", [6, 9, 12])
def test_the_corpus_holds_every_word(high):
  known = set(" ".join(signs.corpus(high=high)).split())
  texts = [text for split in SPLITS
           for row in signs.demonstrations(split, 3000, high=high)
           for text in (row["prompt"], row["completion"])]
  assert set(" ".join(texts).split()) <= known
  assert len(known) < 110


def test_a_word_vocabulary_gives_a_token_per_word_and_keeps_the_reward():
  tokenizer = vocabulary.train_sentencepiece(
      signs.corpus(), model_type="word")
  for row in signs.problems("test", count=200):
    for text in (row["prompt"], row["gold"]):
      ids = tokenizer.encode(text)
      assert len(ids) == len(text.split()) and 0 not in ids
    ids = [*tokenizer.encode(row["gold"]), tokenizer.eos_id]
    assert score(row, tokenizer.decode(ids)) == 1.0


def test_the_constant_baseline_is_what_its_answers_score():
  found = signs.constant_baseline("test", count=512)
  rows = signs.problems("test", count=512)
  answers = [" ".join(itertools.chain(*zip(
      map(str, row["numbers"]), [*found["answer"].split(), ""], strict=True)))
             for row in rows]
  scores = [score(row, answer)
            for row, answer in zip(rows, answers, strict=True)]
  assert found["correct"] == [value == 1 for value in scores]
  assert 0.05 < sum(scores) / 512 < 0.2


@pytest.mark.parametrize("args, message", [
    (dict(split="dev"), "train, validation, test"),
    (dict(split="test", count=10**6), "args.count=1000000"),
    (dict(split="test", low=0), "args.low=0"),
    (dict(split="test", terms=1), "args.terms=1")])
def test_errors_name_the_argument(args, message):
  with pytest.raises(ValueError, match=message):
    signs.problems(**args)
