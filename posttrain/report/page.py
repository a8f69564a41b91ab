"""HTML report of workdirs: one file that needs nothing else, and no network.

Style, script, charts and samples are inline. The page's content policy
forbids every request, so that nothing in a run can add one.
"""

import json
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from posttrain import config as config_lib
from posttrain import workdir as workdir_lib
from posttrain.evaluation import markup, svg
from posttrain.report import curves, evaluations
from posttrain.report.read import Run, Stage, read_runs
from posttrain.telemetry import goodput

POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; "
    "script-src 'unsafe-inline'; img-src data:")
HERE = pathlib.Path(__file__).parent
MAX_ROWS = 64  # Of one source: one rollout file, or one cell of a checkpoint.
MAX_CHARACTERS = 300_000  # Of one source.
FACTS = (
    "finish_reason", "think_end", "think_length", "answer_length", "length",
    "wait_count", "reward", "status", "advantage", "answer")
UNSCORED = ("timeout", "error")


def build(
    workdirs: Sequence[str | os.PathLike],
    output: str | os.PathLike | None = None,
) -> pathlib.Path:
  """Writes the report of one run, or of several in the same plots.

  Args:
    workdirs: of `posttrain train`; finished or not.
    output: the HTML file; `report.html` in the first workdir by default.

  Returns:
    Where the page is.

  Raises:
    WorkdirError: a directory holds no run.
    ValueError: a file of a run is damaged.
  """
  runs = read_runs(workdirs)
  path = pathlib.Path(output or runs[0].path / "report.html")
  workdir_lib.replace_file(path, render(runs).encode(
      errors="backslashreplace"))
  return path


def figures(workdirs: Sequence[str | os.PathLike]) -> str:
  """Formats the accuracies as text; "" before an evaluation."""
  return evaluations.figures(read_runs(workdirs))


def render(runs: Sequence[Run]) -> str:
  """Renders the page."""
  title = " · ".join(run.label for run in runs)
  sections = {
      "Runs": markup.join(_run(run) for run in runs),
      "Evaluation": evaluations.evaluations(runs),
      "Training": curves.curves(runs),
      "Samples": samples(runs),
      "Config": _config(runs)}
  contents = markup.tag("nav", *(
      markup.tag("a", name, attributes={"href": f"#{name.lower()}"})
      for name in sections), markup.Html(
          '<button id="theme" type="button">light / dark</button>'))
  body = markup.join([
      markup.tag("header", markup.tag("h1", title), contents),
      markup.tag("main", *(
          markup.tag("section", markup.tag("h2", name), content,
                     attributes={"id": name.lower()})
          for name, content in sections.items())),
      markup.made_by("report")])
  script = (HERE / "page.js").read_text()
  return markup.document(
      f"posttrain: {title}", body, policy=POLICY,
      style=svg.STYLE + (HERE / "style.css").read_text(),
      script=f"<script>\n{script}</script>\n")


def _run(run: Run) -> markup.Html:
  """Draws a run's model, machine, finished stages and missing files."""
  stages = markup.tag("ol", *(
      markup.tag("li", markup.tag("b", stage.name), f" {stage.kind}, ",
                 "finished" if stage.finished else "not finished",
                 f", step {stage.rows[-1]['step']}"
                 if stage.rows and stage.has_steps else "")
      for stage in run.stages), attributes={"class": "stages"})
  facts = [("model", run.config.get("model", "not recorded")),
           ("seed", run.config.get("seed", "not recorded")),
           *(_environment(run.environments[-1]) if run.environments else [])]
  if len(run.environments) > 1:
    facts.append(("starts", len(run.environments)))
  times = [stage for stage in run.stages if stage.goodput]
  reports = [
      markup.details(f"Data of {stage.name}", markup.table(
          ["", ""], _leaves(stage.data_report, "")))
      for stage in run.stages if stage.data_report]
  return markup.div(
      "run", markup.tag("h3", run.label), stages,
      markup.tag("dl", *(
          markup.tag("dt", name) + markup.tag("dd", value)
          for name, value in facts)),
      *(markup.missing(text) for text in run.missing),
      *([_wall_time(times)] if times else []), *reports)


def _wall_time(stages: Sequence[Stage]) -> markup.Html:
  """Tabulates each stage's time over all starts, and the share of each part."""
  rows = []
  for stage in stages:
    assert stage.goodput is not None
    seconds = stage.goodput["seconds"]
    total = max(sum(seconds.values()), 1e-9)
    rows.append([stage.name, f"{total:.1f} s", str(stage.goodput["starts"]), *(
        markup.percent(seconds[name] / total) for name in goodput.NAMES)])
  return markup.details(
      "Where the wall time went", markup.table(
          ["", "in all", "starts", *(
              name.replace("_", " ") for name in goodput.NAMES)], rows),
      is_open=True)


def _environment(environment: Mapping[str, Any]) -> list[tuple[str, str]]:
  """Formats the last start in a few lines."""
  devices = environment.get("devices", [])
  git = environment.get("git", {})
  commit = git.get("commit")
  versions = environment.get("versions", {})
  return [
      ("started", environment.get("time", "not recorded")),
      ("devices", ", ".join(
          f"{devices.count(name)} x {name}" for name in dict.fromkeys(devices))
       or "not recorded"),
      ("machine", f"{environment.get('platform', 'not recorded')}, "
       f"{environment.get('cores', '?')} cores, "
       f"Python {environment.get('python', '?')}"),
      ("code", (commit[:12] if commit else "no commit recorded")
       + (f" and {len(git['changed'])} changed files"
          if git.get("changed") else "")),
      ("versions", ", ".join(f"{k} {v}" for k, v in versions.items())
       or "not recorded")]


def _leaves(data: Any, prefix: str) -> list[tuple[str, str]]:
  """Lists the leaves of nested dicts, with dotted names."""
  if isinstance(data, Mapping):
    return [leaf for key, value in data.items()
            for leaf in _leaves(value, f"{prefix}.{key}" if prefix else key)]
  if isinstance(data, int | float) and not isinstance(data, bool):
    return [(prefix, markup.number(data))]
  return [(prefix, data if isinstance(data, str) else json.dumps(data))]


def _config(runs: Sequence[Run]) -> markup.Html:
  """Draws the differences between the runs, then each config whole."""
  parts = []
  for other in runs[1:]:
    changes = config_lib.diff(runs[0].config, other.config)
    parts.append(markup.tag("h4", f"{runs[0].label} → {other.label}"))
    parts.append(
        markup.tag("ul", *(markup.tag("li", markup.tag("code", change))
                           for change in changes))
        if changes else markup.tag("p", "The same config."))
  for run in runs:
    parts.append(markup.details(
        f"{run.label}: config.json",
        markup.tag("pre", json.dumps(run.config, indent=2))))
  return markup.join(parts)


def sources(runs: Sequence[Run]) -> list[dict[str, Any]]:
  """Lists the samples of the pager by run, stage and step.

  The page holds a part of them, whole groups (or the same questions in every
  cell), and says how large a part. A completion is never cut.
  """
  found = []
  for run in runs:
    prefix = f"{run.label}: " if len(runs) > 1 else ""
    for stage in run.stages:
      for step, rows in stage.rollouts.items():
        found.append(_source(f"{prefix}{stage.name}, step {step}", rows))
      for result in stage.evaluations:
        cells: dict[str, list[dict[str, Any]]] = {}
        for record in result.get("records", ()):
          cells.setdefault(record["cell"], []).append(record)
        for cell, rows in cells.items():
          found.append(_source(
              f"{prefix}{stage.name}, {result['checkpoint']}, {cell}", rows))
  return [source for source in found if source["rows"]]


def _source(
    label: str, rows: Sequence[Mapping[str, Any]],
) -> dict[str, Any]:
  shown: list[dict[str, Any]] = []
  characters = 0
  for row in rows[:MAX_ROWS]:
    characters += len(row["prompt"]) + len(row["completion"])
    if characters > MAX_CHARACTERS and shown:
      break
    shown.append(_row(row))
  return {"label": label, "total": len(rows), "rows": shown}


def _row(row: Mapping[str, Any]) -> dict[str, Any]:
  """Makes a sample; `good` is null where nothing judged the completion."""
  good = None if row.get("status") in UNSCORED else row.get("correct")
  if good is None and row.get("reward") is not None:
    good = row["reward"] > 0
  facts = {name: _short(row[name]) for name in FACTS if name in row}
  facts |= {f"reward {name}": _short(value)
            for name, value in row.get("rewards", {}).items()}
  facts |= {f"reward {name}": status
            for name, status in row.get("statuses", {}).items()
            if status in UNSCORED}
  return {
      "prompt": row["prompt"], "segments": row["segments"], "good": good,
      "id": f"prompt {row['prompt_id']}, sample {row['sample_id']}",
      "facts": facts}


def _short(value: Any) -> Any:
  return round(value, 4) if isinstance(value, float) else value


def samples(runs: Sequence[Run]) -> markup.Html:
  """Draws the pager and its data."""
  found = sources(runs)
  if not found:
    return markup.missing("No completions have been saved yet.")
  return markup.Html(PAGER) + markup.json_script("samples-data", found)


PAGER = """
<div id="pager" class="pager">
<div class="controls">
<label>From <select id="source"></select></label>
<label>Show <select id="outcome"><option value="">all</option>
<option value="good">right</option><option value="bad">wrong</option></select>
</label>
<label>Containing <input id="contains" type="search" size="14"></label>
<span><button id="previous" type="button" aria-label="previous">←</button>
<span id="where"></span>
<button id="next" type="button" aria-label="next">→</button></span>
</div>
<p class="caption legend"><mark class="prompt">prompt</mark>
<mark class="sampled">sampled by the policy</mark>
<mark class="forced">forced</mark> <mark class="wait">forced wait</mark>
<mark class="observation">observation</mark>
<span id="part"></span></p>
<div id="cards"></div>
<noscript><p class="missing">The samples need JavaScript.</p></noscript>
</div>
"""
