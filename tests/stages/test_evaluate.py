"""Oracle: every figure once more, from the records of the result's file."""

import dataclasses
import itertools
import json
import math
import re

import jax
import numpy as np
import pytest

from posttrain.evaluation import summary
from posttrain.stages import evaluate
from posttrain.telemetry import metrics
from posttrain.train import preemption
from tests import meshes, pipeline_run
from tests.stages import toy

MEASURE = ["stages=measure", "measure.wait_max_thinking_tokens=-1,5",
           "measure.rollout.confidence_window=1000",
           "measure.rollout.confidence_top_k=3"]
MAXIMA, WAITS = (0, 2, 5), (0, 1, 2)
NAMES = ["free", "max_0", "max_2", "max_5", "waits_1", "waits_2",
         "waits_1_max_5", "waits_2_max_5"]


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
  path = tmp_path_factory.mktemp("measured")
  with jax.set_mesh(meshes.one()):
    run = pipeline_run.make_pipeline(path, MEASURE)
    evaluate.run(pipeline_run.from_start(run, "measure"), None)
  return path


@pytest.fixture(scope="module")
def result(workdir):
  return json.loads((workdir / "measure/eval/init.json").read_text())


@pytest.fixture(scope="module")
def cells(result):
  """name -> (figures, {(problem, sample): record})."""
  found = {}
  for figures in result["cells"]:
    rows = [r for r in result["records"] if r["cell"] == figures["name"]]
    found[figures["name"]] = figures, {
        (r["id"], r["sample_id"]): r for r in rows}
    assert len(found[figures["name"]][1]) == len(rows)
  return found


def by_problem(records, name):
  return [[records[problem, sample][name] for sample in range(4)]
          for problem in range(2000, 2006)]


def test_every_problem_is_in_every_cell_and_no_other(result, cells):
  wanted = set(itertools.product(range(2000, 2006), range(4)))
  assert list(cells) == NAMES
  assert all(set(records) == wanted for _, records in cells.values())
  assert len(result["records"]) == len(NAMES) * len(wanted)
  assert result["decoding"]["temperature"] == 1


def answer_of(row):
  """Words behind the delimiter, as the parts of the text are marked.

  The prompt opens the thinking, so that what never closes it has no answer;
  what is forced is the delimiter, or a part of it that the row had room for.
  """
  words = [word.removesuffix("</s>") for text, _ in row["segments"]
           for word in text.split() if word != "</s>"]
  return words[words.index("</think>") + 1:] if "</think>" in words else []


def test_records_are_graded_as_their_text_says(result):
  nulls = 0
  problems = {p["id"]: p for p in toy.problems("test", thinks=True)}
  for row in result["records"]:
    problem, words = problems[row["id"]], answer_of(row)
    assert row["prompt"].split() == problem["prompt"].split()
    wanted = None if "net" in words else float(problem["word"] in words)
    assert row["reward"] == wanted
    assert row["correct"] == (wanted == 1)
    assert row["status"] == ("not_applicable" if wanted is None else "ok")
    assert row["answer_text"].split() == words
    assert row["answer"] == (words[-1] if words else None)
    nulls += wanted is None
  assert nulls


def test_records_have_entropy_and_confidence(result):
  """No completion fills the window, so that its mean is its only group."""
  for row in result["records"]:
    assert row["mean_entropy"] > 0
    assert row["mean_confidence"] == pytest.approx(row["tail_confidence"])
    assert row["mean_confidence"] == pytest.approx(
        row["lowest_group_confidence"])


def test_accuracies_errors_and_lengths(cells):
  for figures, records in cells.values():
    means = [sum(row) / 4 for row in by_problem(records, "correct")]
    mean = sum(means) / 6
    assert figures["accuracy"] == pytest.approx(mean)
    assert figures["standard_error"] == pytest.approx(
        math.sqrt(sum((m - mean)**2 for m in means) / (6 * 5)))
    assert figures["n"] == 6 and figures["samples"] == 4
    for name, field in (("mean_thinking_tokens", "think_length"),
                        ("mean_tokens", "length")):
      assert figures[name] == pytest.approx(np.mean(
          [r[field] for r in records.values()]))
    for reason, share in figures["finish"].items():
      assert share == pytest.approx(np.mean(
          [r["finish_reason"] == reason for r in records.values()]))


def vote(rows):
  """P(right) of a majority, ties broken at random."""
  votes = [r["answer"] for r in rows if r["answer"] is not None]
  if not votes:
    return 0.0
  top = max(map(votes.count, votes))
  winners = {v for v in votes if votes.count(v) == top}
  # Of one answer some samples may be right and some not.
  right = lambda v: np.mean([r["correct"] for r in rows if r["answer"] == v])
  return np.mean([right(v) for v in winners])


def over_subsets(records, k, function):
  return np.mean([
      function([records[problem, s] for s in subset])
      for problem in range(2000, 2006)
      for subset in itertools.combinations(range(4), k)])


def test_pass_at_k_is_over_all_subsets(cells):
  for figures, records in cells.values():
    for k in (1, 2, 4):
      assert figures["pass@k"][str(k)] == pytest.approx(over_subsets(
          records, k, lambda rows: any(r["correct"] for r in rows)))


def test_majority_votes_spend_all_samples(result, cells):
  figures, records = cells["free"]
  baseline = result["summary"]["majority_baseline"]
  assert [row["samples"] for row in baseline] == [1, 2, 3, 4]
  for row in baseline:
    assert row["mean_tokens"] == pytest.approx(
        row["samples"] * figures["mean_thinking_tokens"])
  # One answer that is right here and wrong there is shared out by the counts
  # of all four samples; a single vote has nothing to share.
  assert baseline[0]["accuracy"] == pytest.approx(figures["accuracy"])
  assert baseline[3]["accuracy"] == pytest.approx(
      over_subsets(records, 4, vote))
  assert figures["maj@k"]["4"] == baseline[3]["accuracy"]


def test_no_completion_thinks_longer_than_its_maximum(result, cells):
  _, free = cells["free"]
  closed = 0
  for maximum in MAXIMA:
    figures, records = cells[f"max_{maximum}"]
    assert figures["control"] == 1
    for key, row in records.items():
      assert row["think_length"] <= maximum
      if row["think_end"] == "budget":
        assert row["think_length"] == maximum
        closed += 1
      else:  # The budget had no say: the same bits, the same tokens.
        assert row["segments"] == free[key]["segments"]
      if free[key]["think_length"] > maximum:
        assert row["think_end"] == "budget"
  assert closed
  assert result["summary"]["control_per_sample"] == 1
  assert result["summary"]["control_per_run"] == 1


@pytest.mark.parametrize("maximum", [-1, 5])
def test_waits_are_as_many_as_asked_for_at_most(cells, maximum):
  for waits in (1, 2):
    _, records = cells[f"waits_{waits}" + "_max_5" * (maximum > 0)]
    for key, row in records.items():
      assert row["wait_count"] <= waits
      written = sum(name == "wait" for _, name in row["segments"])
      assert written == row["wait_count"]
      if row["think_end"] == "natural":  # It may end only when all are spent.
        assert row["wait_count"] == waits
      free = cells["free"][1][key]
      if free["think_end"] == "natural" and (
          maximum < 0 or free["think_length"] < maximum):
        assert row["wait_count"] >= 1
  assert any(row["wait_count"] for row in records.values())


def test_waits_under_a_maximum_are_those_without_until_there(cells):
  """One count over all rounds: the waits are in it."""
  closed = 0
  for waits in (1, 2):
    _, free = cells[f"waits_{waits}"]
    figures, bounded = cells[f"waits_{waits}_max_5"]
    assert figures["control"] == 1 and figures["max_thinking_tokens"] == 5
    for key, row in bounded.items():
      assert row["think_length"] <= 5
      if row["think_end"] != "budget":
        assert row["segments"] == free[key]["segments"]
      elif row["wait_count"]:
        closed += 1
  assert closed


@pytest.mark.parametrize("maximum, names", [
    (-1, ["free", "waits_1", "waits_2"]),
    (5, ["max_5", "waits_1_max_5", "waits_2_max_5"])])
def test_flips_lead_from_one_accuracy_to_the_next(
    result, cells, maximum, names):
  flips = [f for f in result["summary"]["flips"]
           if f["max_thinking_tokens"] == maximum]
  assert [(f["from_waits"], f["to_waits"]) for f in flips] == [(0, 1), (1, 2)]
  for flip, a, b in zip(flips, names, names[1:], strict=False):
    before, after = cells[a][1], cells[b][1]
    assert flip["correct_to_wrong"] == sum(
        before[k]["correct"] and not after[k]["correct"] for k in before)
    assert flip["wrong_to_correct"] == sum(
        after[k]["correct"] and not before[k]["correct"] for k in before)
    gained = flip["wrong_to_correct"] - flip["correct_to_wrong"]
    assert gained / flip["n"] == pytest.approx(
        cells[b][0]["accuracy"] - cells[a][0]["accuracy"])


def test_scaling_is_over_the_maxima(result, cells):
  points = [(cells[f"max_{m}"][0]["mean_thinking_tokens"],
             cells[f"max_{m}"][0]["accuracy"]) for m in MAXIMA]
  slopes = [(b[1] - a[1]) / (b[0] - a[0])
            for a, b in itertools.combinations(points, 2)]
  assert result["summary"]["scaling_per_1k"] == pytest.approx(
      1000 * np.mean(slopes))
  assert result["summary"]["performance"] == max(y for _, y in points)


def test_what_is_left_in_the_workdir(workdir, result):
  [row] = metrics.read(workdir / "metrics.jsonl")
  for cell in result["cells"]:
    prefix = f"eval/init/{cell['name']}"
    assert row[f"{prefix}/accuracy"] == cell["accuracy"]
  done = json.loads((workdir / "measure/done.json").read_text())
  assert done["init"]["free"] == result["cells"][0]["accuracy"]
  assert (workdir / "measure/eval/curve.svg").stat().st_size > 1000


def test_what_could_not_be_judged_is_counted_and_told(tmp_path, capsys):
  """It counts as wrong, so that n is the same in every cell."""
  with jax.set_mesh(meshes.one()):
    run = pipeline_run.make_pipeline(tmp_path, [
        "stages=measure", "measure.reward=tests.stages.toy:late",
        "measure.num_waits=", "measure.max_thinking_tokens=2"])
    evaluate.run(pipeline_run.from_start(run, "measure"), None)
  result = json.loads((tmp_path / "measure/eval/init.json").read_text())
  [row] = metrics.read(tmp_path / "metrics.jsonl")
  told = " ".join(capsys.readouterr().out.split())
  total = 0
  for figures in result["cells"]:
    rows = [r for r in result["records"] if r["cell"] == figures["name"]]
    late = ["pong" in answer_of(r) for r in rows]
    right = [not slow and "ping" in answer_of(r)
             for r, slow in zip(rows, late, strict=True)]
    assert [r["status"] == "timeout" for r in rows] == late
    assert [r["correct"] for r in rows] == right
    assert [r["reward"] is None for r in rows] == late
    assert figures["unscored"] == sum(late) and figures["n"] == 6
    assert figures["accuracy"] == pytest.approx(np.mean(right))
    assert row[f"eval/init/{figures['name']}/unscored"] == sum(late)
    # Of each batch.
    assert sum(late) == sum(map(int, re.findall(
        rf"{figures['name']}: (\d+) of \d+ completions have no score", told)))
    total += sum(late)
  assert total and "They count as wrong" in told


def test_fewer_sequences_at_a_time_ask_the_same(result, tmp_path):
  """Near ties apart."""
  with jax.set_mesh(meshes.one()):
    run = pipeline_run.make_pipeline(tmp_path, [
        "stages=measure", "measure.rollout.max_num_seqs=4",
        "measure.num_waits=", "measure.max_thinking_tokens=2"])
    evaluation = evaluate.Evaluation(
        run.context("measure"), pipeline_run.calls())
    again = evaluation.evaluate("init", lambda: pipeline_run.start(run))
  # As JSON has them: a tuple comes back as a list.
  records = json.loads(json.dumps(again["records"]))
  # Entropy and confidence, which only `result` has, differ by rounding.
  wanted = [{name: r[name] for name in records[0]} for r in result["records"]
            if r["cell"] in ("free", "max_2")]
  same = [a == b for a, b in zip(records, wanted, strict=True)]
  assert np.mean(same) > 0.95


def chunks_of_cells(path, monkeypatch):
  """Counts the chunks of each cell of one checkpoint."""
  found, original = [], evaluate.Evaluation._answer

  def answer(self, model, cell):
    with monkeypatch.context() as patched:
      chunks = pipeline_run.count_chunks(patched)
      records = original(self, model, cell)
    found.append(len(chunks))
    return records

  with jax.set_mesh(meshes.one()), monkeypatch.context() as patched:
    patched.setattr(evaluate.Evaluation, "_answer", answer)
    run = pipeline_run.make_pipeline(path, MEASURE)
    evaluate.Evaluation(
        run.context("measure"), pipeline_run.calls()).evaluate(
        "init", lambda: pipeline_run.start(run))
  return found


def test_left_at_sigterm_finished_cells_are_kept(
    workdir, tmp_path, monkeypatch):
  """Two checkpoints of eight cells; the signal comes in the second's third.

  Of 24 completions 16 decode together, so that a cell has several chunks.
  """
  both = [*MEASURE, "measure.checkpoints=init,/some/where"]
  asked = []
  before = tmp_path.with_name(f"{tmp_path.name}_before")
  of_cells = chunks_of_cells(before, monkeypatch)
  assert min(of_cells) > 1
  def weights_of(name):
    asked.append(name)
    return pipeline_run.start(run)
  with jax.set_mesh(meshes.one()):
    # A part of the cell is drawn.
    run = pipeline_run.make_pipeline(tmp_path, both)
    with monkeypatch.context() as patched, pytest.raises(
        preemption.Preempted, match="finished are kept"):
      pipeline_run.count_chunks(
          patched, leave_before=sum(of_cells) + sum(of_cells[:2]) + 2)
      evaluate.run(dataclasses.replace(
          run.context("measure"), weights_of=weights_of), None)
    first = tmp_path / "measure/eval/init.json"
    assert results_of(first) == results_of(workdir / "measure/eval/init.json")
    written = first.stat().st_mtime_ns
    kept = tmp_path / "measure/eval/cells/some_where"
    assert [f.name for f in sorted(kept.iterdir())] == [
        "free.json", "max_0.json"]
    assert not (tmp_path / "measure/done.json").exists()
    chunks = pipeline_run.count_chunks(monkeypatch)
    run = pipeline_run.make_pipeline(tmp_path, both)
    evaluate.run(dataclasses.replace(
          run.context("measure"), weights_of=weights_of), None)
  assert len(chunks) == sum(of_cells[2:])
  assert asked == ["init", "/some/where", "/some/where"]
  assert first.stat().st_mtime_ns == written
  second = results_of(tmp_path / "measure/eval/some_where.json")
  assert second == results_of(first) | {"checkpoint": "some_where"}
  assert not kept.parent.exists()


def results_of(file):
  """Without what differs as another number of checkpoints was asked for."""
  found = json.loads(file.read_text())
  found["section"].pop("checkpoints")
  return found


@pytest.mark.parametrize("spoil, again, said", [
    (lambda text: text, False, "init free: kept from an earlier start"),
    (lambda text: text[:-9], True, "is damaged"),
    (lambda text: text.replace('"seed": 0', '"seed": 1'), True,
     "made with other settings"),
    (lambda text: text.replace('"count": 6', '"count": 5'), True,
     "made with other settings"),
    (lambda text: text.replace('"code": "', '"code": "of another version'),
     True, "made with other settings")])
def test_a_kept_cell_of_other_settings_is_evaluated_again(
    result, tmp_path, monkeypatch, capsys, spoil, again, said):
  with jax.set_mesh(meshes.one()):
    run = pipeline_run.make_pipeline(tmp_path, MEASURE)
    evaluation = evaluate.Evaluation(
        run.context("measure"), pipeline_run.calls())
    weights = lambda: pipeline_run.start(run)
    free = summary.Cell()
    wanted = evaluation._records("init", free, weights)
    file = tmp_path / "measure/eval/cells/init/free.json"
    file.write_text(spoil(file.read_text()))
    decoded = pipeline_run.count_chunks(monkeypatch)
    found = evaluation._records("init", free, weights)
  assert bool(decoded) == again
  assert said in capsys.readouterr().out
  # As JSON has them: a tuple comes back as a list.
  assert json.dumps(found) == json.dumps(wanted)


def test_votes_are_saved_and_can_be_graded_again(tmp_path):
  """Two samples a problem for the figures, and two more for the votes."""
  with jax.set_mesh(meshes.one()):
    run = pipeline_run.make_pipeline(tmp_path, [
        "stages=measure", "measure.samples_per_problem=2",
        "measure.pass_at=1,2", "measure.num_waits=",
        "measure.max_thinking_tokens="])
    evaluate.run(pipeline_run.from_start(run, "measure"), None)
  found = json.loads((tmp_path / "measure/eval/init.json").read_text())
  assert {(r["id"], r["sample_id"]) for r in found["majority_records"]} == set(
      itertools.product(range(2000, 2006), (2, 3)))
  assert {r["sample_id"] for r in found["records"]} == {0, 1}
  problems = {p["id"]: p for p in toy.problems("test", thinks=True)}
  rows = {}
  for row in found["records"] + found["majority_records"]:
    words = answer_of(row)
    correct = "net" not in words and problems[row["id"]]["word"] in words
    rows[row["id"], row["sample_id"]] = {
        "answer": words[-1] if words else None, "correct": correct}
  baseline = found["summary"]["majority_baseline"]
  assert [row["samples"] for row in baseline] == [1, 2, 3, 4]
  assert baseline[0]["accuracy"] == pytest.approx(
      np.mean([row["correct"] for row in rows.values()]))
  assert baseline[3]["accuracy"] == pytest.approx(over_subsets(rows, 4, vote))
  [free] = found["cells"]
  assert free["samples"] == 2 and free["accuracy"] == pytest.approx(np.mean(
      [row["correct"] for (_, sample), row in rows.items() if sample < 2]))


def test_a_budget_without_room_for_an_answer_is_an_error_at_once(tmp_path):
  """Closing takes one token here, and the answer one: nine do not fit."""
  with jax.set_mesh(meshes.one()):
    run = pipeline_run.make_pipeline(
        tmp_path, [*MEASURE, "measure.wait_max_thinking_tokens=-1,9"])
    with pytest.raises(
        ValueError, match=r"measure: .* leaves no room for an answer: 9 "
        "thinking tokens"):
      evaluate.check(run.context("measure"))


def test_more_problems_than_there_are_is_an_error(tmp_path):
  with jax.set_mesh(meshes.one()):
    run = pipeline_run.make_pipeline(
        tmp_path, [*MEASURE, "measure.problems.count=25"])
    with pytest.raises(ValueError, match="split has 24 problems"):
      evaluate.check(run.context("measure"))


def test_problems_of_one_id_are_an_error(tmp_path):
  with jax.set_mesh(meshes.one()):
    run = pipeline_run.make_pipeline(tmp_path, [
        *MEASURE, "measure.problems.task=tests.stages.toy:nameless"])
    with pytest.raises(ValueError, match="Two problems of the task have id=0"):
      evaluate.check(run.context("measure"))


@pytest.mark.parametrize("task, said", [
    ("kindred", "warning: measure: The questions are of 3 clusters, fewer "
     "than 10"), ("problems", "")])
def test_few_clusters_are_warned_about_at_the_start(
    tmp_path, capsys, task, said):
  with jax.set_mesh(meshes.one()):
    run = pipeline_run.make_pipeline(tmp_path, [
        *MEASURE, f"measure.problems.task=tests.stages.toy:{task}"])
    evaluate.Evaluation(
        run.context("measure"), pipeline_run.calls())
  out = capsys.readouterr().out
  assert said in out and ("clusters" in out) == bool(said)


@pytest.mark.parametrize("figures, said", [
    (dict(standard_error=0.125), "0.500 +- 0.125 (n 6)"),
    (dict(standard_error=None), "0.500 +- n/a (n 6)"),
    (dict(standard_error=0.25, num_clusters=3),
     "0.500 +- 0.250 (n 6 in 3 clusters)"),
    (dict(standard_error=0.125, unscored=3),
     "0.500 +- 0.125 (n 6, 3 of 12 not scored)")])
def test_an_error_is_said_with_its_clusters(figures, said):
  assert said in evaluate._line("init", dict(
      name="free", accuracy=0.5, n=6, samples=2, unscored=0,
      mean_thinking_tokens=1.0) | figures)


def test_clusters_are_those_of_the_task():
  rows = [dict(id=i, cluster=c) for i, c in enumerate("aab")]
  assert evaluate.clusters(rows).tolist() == ["a", "a", "b"]
  assert evaluate.clusters(toy.problems("test")) is None
  with pytest.raises(ValueError, match=r"1 of 4 problems .* no `cluster`"):
    evaluate.clusters([*rows, dict(id=3)])
