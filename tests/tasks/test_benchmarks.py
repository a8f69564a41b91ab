r"""GSM8K and MATH-500: written files, and the real ones where they are.

POSTTRAIN_DATA names a folder that holds `gsm8k/` and `math500/`.
"""

import json
import os
from pathlib import Path

import pytest

from posttrain.tasks import gsm8k, math500, scoring, symbolic

JANET = ("Natalia sold 48/2 = <<48/2=24>>24 clips.\n"
         "In all 48+24 = <<48+24=72>>72 clips.\n#### 1,072")


def real_folder(name):
  root = os.environ.get("POSTTRAIN_DATA", "")
  if not root:
    pytest.skip(f"POSTTRAIN_DATA names no folder with {name}/ in it")
  return str(Path(root) / name)


def write(folder, name, rows):
  (folder / name).write_bytes(b"".join(
      row if isinstance(row, bytes) else row.encode() if isinstance(row, str)
      else json.dumps(row).encode() + b"\n" for row in rows))
  return str(folder)


def test_gsm8k_rows(tmp_path):
  path = write(tmp_path, "train.jsonl", [
      dict(question="How many? ", answer=JANET),
      dict(question="And?", answer="#### -3")])
  rows = gsm8k.problems("train", path=path, instruction="Be brief.")
  assert rows[0] == dict(
      id=0, prompt="How many?\n\nBe brief.", answer="1072",
      gold="Natalia sold 48/2 = 24 clips.\nIn all 48+24 = 72 clips.\n"
           "#### 1,072")
  assert rows[1]["answer"] == "-3"
  assert gsm8k.demonstrations("train", path=path, count=1) == [dict(
      id=0, prompt="How many?", completion=rows[0]["gold"])]


@pytest.mark.parametrize("completion, score", [
    ("#### 1072", 1), ("#### 1,072.", 1), ("#### $1,072.00", 1),
    ("so 5 of them.\n#### 1072\n\nDo you want 3 more?", 1),
    ("The answer is 1072.", 1), ("1072 or 1073", 0), ("#### 107", 0),
    ("#### unknown 1072", 1), ("#### unknown, of 5", 0), ("1072\n####", 0),
    ("", 0)])
def test_gsm8k_reward(completion, score):
  assert gsm8k.reward("", completion, answer="1072", id=0) == score


def test_math500_reward():
  reward = lambda text: math500.reward("", text, answer=r"\frac{1}{2}", level=1)
  assert reward(r"It is $\boxed{\dfrac{2}{4}}$.") == 1.0
  assert reward(r"\boxed{3}, no: \boxed{0.5}") == 1.0
  assert reward(r"\boxed{0.5}, no: \boxed{3}") == 0.0
  assert reward("It is 0.5.") == 0.0


@pytest.mark.parametrize("status", ["timeout", "error"])
def test_math500_says_what_it_could_not_judge(monkeypatch, status):
  """It was a silent 0."""
  monkeypatch.setattr(symbolic, "compare", lambda *args, **kwargs:
                      symbolic.Verdict(status, "more than 5 s"))
  value, found, reason = scoring.call(
      "posttrain.tasks.math500:reward", dict(id=3, answer="7"),
      scoring.Completion(r"\boxed{9^{9^9}}"))
  assert value is None and found == status and "9^{9^9}" in reason


def test_math500_votes_are_spelled_one_way():
  votes = {math500.extract(rf"\boxed{{{text}}}") for text in (
      r"\dfrac{1}{2}", r"\frac{1}{2}", r"\tfrac{1}{2}.", r" \frac{1}{2}\, ")}
  assert votes == {r"\frac{1}{2}"}
  assert math500.extract(r"\boxed{023}") == "23"
  assert math500.extract(r"\boxed{\left(1, 2\right)}") == "(1, 2)"
  assert math500.extract(r"x \leftarrow 5") is None
  assert math500.extract(r"\boxed{x \leftarrow 5}") == r"x \leftarrow 5"


def test_math500_checks_gold_answers(tmp_path):
  row = dict(problem="p", solution=r"\boxed{5}", answer="5", level=2)
  path = write(tmp_path, "test.jsonl", [row, {**row, "answer": r"\frac{"}])
  assert math500.problems("test", path=path, count=1)[0] == dict(
      id=0, prompt="p\n\n" + math500.INSTRUCTION, gold=r"\boxed{5}",
      answer="5", subject=None, level=2)
  rows = math500.problems("test", path=path)
  statuses = [scoring.call(
      "posttrain.tasks.math500:reward", row, scoring.Completion(row["gold"]))
      for row in rows]
  assert statuses[0] == [1, "ok", ""] and statuses[1][1] == "error"
  assert "cannot parse the gold answer" in statuses[1][2]


@pytest.mark.parametrize("rows, message", [
    ([dict(question="q", answer="#### 1"), "{"], "line 2: not JSON"),
    (["[1]\n"], "line 1: a JSON list"),
    (['{"question": "\\udc00", "answer": "#### 1"}\n'], "line 1: a text with"),
    (['{"question": "q", "x": %s}\n' % ("1" * 5000)], "line 1: a whole number"),
    (["[" * 100_000], "line 1: nested more than 100 deep"),
    (['{"question": "q", "question": "r", "answer": "#### 1"}\n'],
     "line 1: 'question' is there twice"),
    ([dict(question="q", answer="#### 1"), b"\xff"], "line 2: not UTF-8"),
    ([dict(question="q")], "line 1: 'answer' should be a text"),
    ([dict(question=3, answer="#### 1")], "'question' should be a text"),
    ([dict(question="q", answer="no mark 5")], "line 1: .*#### NUMBER"),
    ([dict(question="q", answer="#### x")], "line 1: .*#### NUMBER"),
    ([], "0 rows")])
def test_a_malformed_row_is_named(tmp_path, rows, message):
  with pytest.raises(ValueError, match=message):
    gsm8k.problems("test", path=write(tmp_path, "test.jsonl", rows))


def test_a_missing_file_says_how_to_get_it(tmp_path):
  for path in ("", str(tmp_path)):
    with pytest.raises(ValueError, match="git clone https"):
      gsm8k.problems("train", path=path)
    with pytest.raises(ValueError, match=r"curl .*MATH-500"):
      math500.problems("test", path=path)
  with pytest.raises(ValueError, match="no split 'dev'"):
    gsm8k.problems("dev", path="")
  with pytest.raises(ValueError, match="no split 'train'"):
    math500.problems("train", path="")


def test_too_many_rows_are_an_error(tmp_path):
  path = write(tmp_path, "test.jsonl", [dict(question="q", answer="#### 1")])
  with pytest.raises(ValueError, match=r"args\.count=2"):
    gsm8k.problems("test", path=path, count=2)


@pytest.mark.parametrize("split, size", [("train", 7473), ("test", 1319)])
def test_every_gsm8k_gold_scores_one(split, size):
  rows = gsm8k.problems(split, path=real_folder("gsm8k"))
  assert len(rows) == size
  wrong = [row["id"] for row in rows if gsm8k.reward(
      row["prompt"], row["gold"], answer=row["answer"]) != 1.0]
  assert not wrong
  assert not any("<<" in row["gold"] for row in rows)


def test_no_math500_gold_is_a_time_of_day():
  """So none is compared otherwise than by math-verify."""
  rows = math500.problems("test", path=real_folder("math500"))
  assert not [row["answer"] for row in rows
              if symbolic.time_of_day(row["answer"])]


def test_every_math500_gold_scores_one():
  rows = math500.problems("test", path=real_folder("math500"))
  assert len(rows) == 500
  for text in ("gold", "answer"):
    wrong = [row["id"] for row in rows if math500.reward(
        row["prompt"], row["gold"] if text == "gold" else
        rf"\boxed{{{row['answer']}}}", answer=row["answer"]) != 1.0]
    assert not wrong
