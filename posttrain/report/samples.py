"""Completions for the page's pager: rollouts and evaluation records.

The page holds a part of them, whole groups (or the same questions in every
cell), and says how large a part. A completion is never cut.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from posttrain.evaluation import markup
from posttrain.report.read import Run

MAX_ROWS = 64  # Of one source: one rollout file, or one cell of a checkpoint.
MAX_CHARACTERS = 300_000  # Of one source.
FACTS = (
    "finish_reason", "think_end", "think_length", "answer_length", "length",
    "wait_count", "reward", "status", "advantage", "answer")
UNSCORED = ("timeout", "error")


def sources(runs: Sequence[Run]) -> list[dict[str, Any]]:
  """Lists the samples of the pager by run, stage and step."""
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
<span id="part"></span></p>
<div id="cards"></div>
<noscript><p class="missing">The samples need JavaScript.</p></noscript>
</div>
"""
