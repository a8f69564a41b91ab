"""The page of a synthetic run, parsed: what it holds and what it must not."""

import html.parser
import json
import re
import shutil

import pytest

from posttrain import report
from posttrain import workdir as workdir_lib
from posttrain.report import curves, read
from posttrain.stages import rl_programs
from tests.report import synthetic

VOID = {"meta", "input", "br", "img", "link", "hr"}


class Page(html.parser.HTMLParser):
  """Elements with their attributes, and the text outside of scripts."""

  def __init__(self, path):
    super().__init__()
    self.elements, self.texts, self.scripts = [], [], {}
    self._open = []
    self.source = path.read_text()
    self.feed(self.source)
    assert self._open == [], "every element is closed"

  def handle_starttag(self, tag, attributes):
    self.elements.append((tag, dict(attributes)))
    if tag not in VOID:
      self._open.append((tag, dict(attributes)))

  def handle_startendtag(self, tag, attributes):
    self.elements.append((tag, dict(attributes)))

  def handle_endtag(self, tag):
    assert self._open.pop()[0] == tag

  def handle_data(self, data):
    tag, attributes = self._open[-1] if self._open else ("", {})
    if tag == "script":
      self.scripts[attributes.get("id", "")] = data
    elif tag != "style" and data.strip():
      self.texts.append(data)

  @property
  def text(self):
    return " ".join(" ".join(self.texts).split())

  def samples(self):
    return json.loads(self.scripts["samples-data"])


@pytest.fixture(scope="module")
def one(tmp_path_factory):
  path = synthetic.write(tmp_path_factory.mktemp("runs") / "one", nasty=True)
  return Page(report.build([path]))


@pytest.fixture(scope="module")
def both(tmp_path_factory):
  folder = tmp_path_factory.mktemp("runs")
  runs = [
      synthetic.write(folder / "one"),
      synthetic.write(folder / "two", seed=4, learning_rate=3e-4)]
  return Page(report.build(runs, folder / "both.html"))


def test_where_the_wall_time_went(one):
  """100 seconds: the shares are the figures."""
  assert re.search(
      r"Where the wall time went.* warm_up 100\.0 s 3 60\.0% 20\.0% 1\.0% "
      r"3\.0% 3\.5% 0\.5% 2\.0% 10\.0%", one.text)
  assert "Utilisation" in one.text


def test_nothing_is_fetched(one):
  for tag, attributes in one.elements:
    assert tag not in ("link", "iframe", "img", "object", "embed", "base")
    assert "src" not in attributes
    assert attributes.get("href", "#").startswith("#")
    assert not any(name.startswith("on") for name in attributes)
  addresses = set(re.findall(r"https?://[^\s\"'<)]+", one.source))
  assert addresses == {"http://www.w3.org/2000/svg"}  # A name, no address.
  assert "url(" not in one.source and "@import" not in one.source
  policy = [a["content"] for _, a in one.elements
            if a.get("http-equiv") == "Content-Security-Policy"]
  assert policy and policy[0].startswith("default-src 'none'")


def test_a_completion_cannot_become_markup(one):
  assert "<img" not in one.source
  assert one.source.count("</script>") == one.source.count("<script")
  (rows,) = (
      s["rows"] for s in one.samples() if s["label"] == "reason, step 0")
  assert rows[0]["prompt"] == synthetic.NASTY
  assert rows[0]["segments"][0] == [synthetic.NASTY, "sampled"]


def test_the_evaluation_has_n_and_standard_errors(one):
  # .76 of 100: the standard error is sqrt(.76 * .24 / 100) = .0427.
  assert "reason free 100 76.0% ± 4.3" in one.text
  assert "at most 8 thinking tokens 100 14.0% ± 3.5" in one.text
  assert "n 100, standard error 4.3%" in one.text
  assert "+8.1 points" in one.text and "77.0%" in one.text
  assert "0 → 1 3 10 +7.0 points 100" in one.text
  # 39 questions of 100 went from wrong to right and none back, so the
  # standard error of the difference is sqrt(.39 * .61 / 99).
  assert "+39.0 ± 4.9 points on warm_up, paired" in one.text


def clustered(tmp_path, clusters, error):
  """The page of two checkpoints whose questions are of so many clusters."""
  path = synthetic.write(tmp_path / "run")
  (path / "measure" / "eval" / "init.json").unlink()
  for name, level in (("warm_up", 0.1), ("reason", 0.35)):
    data = synthetic.evaluation(name, level, 0.16)
    for cell in data["cells"]:
      cell |= dict(standard_error=error, num_clusters=clusters)
    for record in data["records"]:
      record["cluster"] = record["id"] % clusters
    synthetic.write_json(path / "measure" / "eval" / f"{name}.json", data)
  return path, Page(report.build([path]))


def test_one_cluster_has_no_standard_error(tmp_path):
  path, page = clustered(tmp_path, 1, None)
  assert "reason free 100 76.0% ± n/a" in page.text
  assert "n 100 in 1 cluster, standard error n/a" in page.text
  assert "+25.0 ± n/a points on warm_up, paired" in page.text
  assert "reason, free: 76.0% ± n/a (n 100), 48.0 thinking" in page.text
  assert page.text.count("the standard error is undefined (n/a).") == 1
  assert "nan" not in page.text.lower().split()
  assert "76.0% ± n/a (n 100)" in report.figures([path])


def test_few_clusters_are_said(tmp_path):
  _, page = clustered(tmp_path, 4, 0.1)
  # 25 questions of 100 more are right: those with id % 100 in 51 to 75.
  means = [sum(i % 4 == c for i in range(51, 76)) for c in range(4)]
  error = (4 / 3 * sum((m - 25 / 4)**2 for m in means))**.5
  assert f"+25.0 ± {error:.1f} points on warm_up, paired" in page.text
  assert "n 100 in 4 clusters, standard error 10.0%" in page.text
  assert page.text.count("of 4 clusters, fewer than 10") == 1


def test_enough_clusters_need_no_remark(tmp_path):
  assert "fewer than" not in clustered(tmp_path, 10, 0.1)[1].text


def test_the_scaling_plot_has_a_mark_for_each_cell(one):
  for checkpoint in ("init", "warm_up", "reason"):
    told = [t for t in one.texts if t.startswith(f"{checkpoint}, ")]
    assert len(told) == 8
  assert ("reason, 2 forced waits: 89.0% ± 3.1 (n 100), 84.0 thinking tokens"
          in one.texts)
  assert "majority vote of free samples" in one.text


def hover(page, label):
  charts = [json.loads(a["data-hover"]) for _, a in page.elements
            if a.get("aria-label") == label and "data-hover" in a]
  return [series for chart in charts for series in chart["series"]]


def test_the_terminal_has_every_accuracy(tmp_path):
  path = synthetic.write(tmp_path / "run")
  lines = report.figures([path]).splitlines()
  cells = [(name, cell) for name in ("init", "warm_up", "reason")
           for cell in json.loads(
               (path / f"measure/eval/{name}.json").read_text())["cells"]]
  assert len(lines) == len(cells) > 3
  for line, (name, cell) in zip(lines, cells, strict=True):
    assert line.startswith(f"measure  {name}, ")
    assert line.endswith(
        f": {100 * cell['accuracy']:.1f}% ± "
        f"{100 * cell['standard_error']:.1f} (n {cell['n']})")


def test_curves_hold_every_step(one):
  training, held_out = hover(one, "Loss")
  assert training["x"] == list(range(1, 61))
  assert held_out["x"] == [20, 40, 60]
  (reward,) = hover(one, "Reward")
  assert reward["x"] == list(range(1, 41))
  gradient = hover(one, "Gradient norm")[1]
  assert gradient["y"][6] is None  # It was not finite: a gap, not a number.
  for title in ("Entropy", "Lengths", "Clipped ratios", "Throughput",
                "Sampler against trainer", "Where the time goes"):
    assert hover(one, title), title


def test_unknown_metrics_are_drawn_and_absent_ones_named(one):
  assert hover(one, "ratio/mean")[0]["y"] == ["1"] * 40
  assert "Not recorded: kl to the reference." in one.text


def test_waits_that_the_policy_said_are_counted_without_forced_ones(both):
  waits = hover(both, "Waits of the policy's own")
  assert [series["label"] for series in waits] == ["one", "two"]
  for series in waits:
    assert (series["x"], series["y"]) == ([0, 20, 38], ["1", "1", "1"])


def test_config_and_environment(one):
  for text in ("8 x cpu cpu", "jax 0.10.2", "0123456789ab", "1 changed files",
               "data.examples 16,000", '"learning_rate": 0.0015'):
    assert text in one.text


def test_samples_carry_provenance_and_say_how_many_there_are(one):
  source = one.samples()[0]
  assert (source["label"], source["total"]) == ("reason, step 0", 80)
  assert len(source["rows"]) == 64
  assert {name for row in source["rows"] for _, name in row["segments"]} == {
      "sampled", "forced", "wait"}
  labels = [s["label"] for s in one.samples()]
  assert "measure, warm_up, max_16" in labels and len(labels) == 3 + 3 * 8


def test_runs_share_their_plots(both):
  labels = [series["label"] for series in hover(both, "Reward")]
  assert labels == ["one", "two"]
  assert [s["label"] for s in hover(both, "Loss")] == [
      "one: training", "one: held out", "two: training", "two: held out"]
  assert "two: reason, free: 80.0%" in both.text
  assert "reason.learning_rate: 0.0001 -> 0.0003" in both.text


def test_what_is_missing_is_said(tmp_path):
  path = tmp_path / "young"
  synthetic.write(path)
  for name in ("metrics.jsonl", "environment.json", "reason/done.json"):
    (path / name).unlink()
  shutil.rmtree(path / "reason" / "rollouts")
  shutil.rmtree(path / "measure")
  page = Page(report.build([path]))
  for text in ("There is no metrics.jsonl", "There is no environment.json",
               "Stage reason has not finished", "has saved no rollouts",
               "Stage measure has not started", "No metrics.",
               "No evaluation has been written yet",
               "No completions have been saved yet"):
    assert text in page.text, text


def test_results_without_waits_maxima_or_errors(tmp_path):
  path = synthetic.write(tmp_path / "run")
  data = synthetic.evaluation("reason", 0.35, 0.16)
  data["cells"] = data["cells"][:1]
  data["cells"][0]["standard_error"] = None
  data["summary"] = {"flips": []}
  for file in (path / "measure" / "eval").glob("*.json"):
    file.unlink()
  synthetic.write_json(path / "measure" / "eval" / "reason.json", data)
  page = Page(report.build([path]))
  assert "reason free 100 76.0% ± n/a" in page.text
  assert "n 100, standard error n/a" in page.text
  assert "no Control, Scaling and Performance" in page.text
  assert "No forced waits were measured" in page.text


def test_what_could_not_be_judged_is_shown_as_that(tmp_path):
  """Beside the accuracy, in which it is wrong; in the samples, as neither."""
  path = synthetic.write(tmp_path / "run")
  data = synthetic.evaluation("reason", 0.35, 0.16)
  data["cells"][0]["unscored"] = 7
  data["records"][0] |= {
      "status": "timeout", "reward": None, "correct": False}
  synthetic.write_json(path / "measure" / "eval" / "reason.json", data)
  file = path / "reason/rollouts/step_000000.jsonl"
  rows = [json.loads(line) for line in file.read_text().splitlines()]
  rows[0] |= {"reward": None, "rewards": {"score": None},
              "statuses": {"score": "error"}}
  synthetic.write_lines(file, rows)
  page = Page(report.build([path]))
  assert "n 100, 7 not scored, standard error 4.3%" in page.text
  assert any(text.startswith("reason, free: 76.0% ± 4.3 (n 100, 7 not scored)")
             for text in page.texts)
  assert "1.0% 7.0% reason at most 8" in page.text  # No answer, not scored.
  assert "free: 76.0% ± 4.3 (n 100, 7 not scored)\n" in report.figures([path])
  shown = {source["label"]: source["rows"] for source in page.samples()}
  first = shown["reason, step 0"][0]
  assert first["good"] is None and first["facts"]["reward score"] == "error"
  assert [row["good"] for row in shown["measure, reason, free"]
          if row["facts"].get("status") == "timeout"] == [None]


def test_waits_under_a_maximum_are_told_with_it(tmp_path):
  path = synthetic.write(tmp_path / "run")
  data = synthetic.evaluation("reason", 0.35, 0.16)
  wait = next(c for c in data["cells"] if c["name"] == "waits_2")
  data["cells"].append(
      wait | {"name": "waits_2_max_64", "max_thinking_tokens": 64})
  data["summary"]["flips"].append({
      "max_thinking_tokens": 64, "from_waits": 0, "to_waits": 2,
      "correct_to_wrong": 1, "wrong_to_correct": 2, "n": 100})
  for file in (path / "measure" / "eval").glob("*.json"):
    file.unlink()
  synthetic.write_json(path / "measure" / "eval" / "reason.json", data)
  page = Page(report.build([path]))
  assert ("reason, 2 forced waits, at most 64 thinking tokens: 89.0% ± 3.1 "
          "(n 100), 84.0 thinking tokens" in page.texts)
  assert "reason 2 forced waits, at most 64 thinking tokens 100" in page.text
  assert "0 → 2, at most 64 1 2 +1.0 points 100" in page.text
  # From the maximum alone to the waits under it; and the waits without one.
  dashed = [a["d"] for name, a in page.elements
            if a.get("class") == "line waits"]
  assert sorted(path.count("L") + path.count("M") for path in dashed) == [2, 4]


def test_a_model_that_does_not_think_has_no_curve(tmp_path):
  path = synthetic.write(tmp_path / "run")
  data = synthetic.evaluation("reason", 0.35, 0.16)
  data["cells"] = [data["cells"][0] | {"mean_thinking_tokens": 0.0}]
  data["summary"] = {"flips": []}
  for file in (path / "measure" / "eval").glob("*.json"):
    file.unlink()
  synthetic.write_json(path / "measure" / "eval" / "reason.json", data)
  page = Page(report.build([path]))
  assert "No completion has a thinking token" in page.text
  assert "reason free" in page.text


def test_a_run_under_way_has_a_torn_last_line(tmp_path):
  path = synthetic.write(tmp_path / "run")
  with (path / "metrics.jsonl").open("a") as file:
    file.write('{"stage": "reason", "st')
  assert hover(Page(report.build([path])), "Reward")


def test_damage_is_an_error_that_names_the_file(tmp_path):
  path = synthetic.write(tmp_path / "run")
  file = path / "reason" / "rollouts" / "step_000020.jsonl"
  file.write_text('{"prompt": 1\n')
  with pytest.raises(ValueError, match=r"step_000020.jsonl is damaged: line 1"):
    report.build([path])


def test_no_run_is_an_error(tmp_path):
  with pytest.raises(workdir_lib.WorkdirError, match="holds no run"):
    report.build([tmp_path])


def test_long_sources_are_cut_between_completions(tmp_path):
  path = synthetic.write(tmp_path / "run")
  file = path / "reason" / "rollouts" / "step_000000.jsonl"
  rows = read.read_lines(file)
  for row in rows:
    row["completion"] = "x" * 100_000
    row["segments"] = [["x" * 100_000, "sampled"]]
  synthetic.write_lines(file, rows)
  source = Page(report.build([path])).samples()[0]
  assert source["total"] == 80
  assert 1 <= len(source["rows"]) <= 3
  assert len(source["rows"][0]["segments"][0][0]) == 100_000


def test_the_time_stack_adds_up(tmp_path):
  """Thinned and stacked, the areas hold the seconds that were spent."""
  path = synthetic.write(tmp_path / "run")
  (run,) = read.read_runs([path])
  stage = run.stages[1]
  chart = next(c for c in rl_programs.CHARTS if c.stacked)
  lines = curves.filled(
      curves.series(chart, [(run, stage)], compare=False))
  width = curves.bar_width(lines)
  thin = [curves.svg.thinned(line, width) for line in lines]
  spent = sum(
      row.get(name, 0.0) for row in stage.rows for name in chart.metrics)
  assert width == 2  # Two updates for each batch of rollouts.
  assert sum(curves.stack(thin)[-1].ys) * width == pytest.approx(spent)
