"""Figures of an evaluation, from the scored completions of one model.

A cell is one setting of the budgets, on the same problems with the same random
bits: two cells differ in the budget alone.

  Q: problems    M: samples of each
"""

import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from posttrain.evaluation import scaling, statistics

UNSCORED = ("timeout", "error")  # Statuses of completions without a score.
TOKENS_PER_STEP = 100  # s1 compares mean tokens with a budget of steps so.


@dataclasses.dataclass(frozen=True)
class Cell:
  """One setting of the budgets; -1 is no maximum.

  Attributes:
    asked: unit or class that the prompt asks for: "tokens", "steps", "short" or
      "long"; "" for no instruction.
    amount: number of tokens or steps that the prompt asks for. It is a request;
      only a budget (`max_thinking_...`) enforces it.
  """

  max_thinking_tokens: int = -1
  num_waits: int = 0
  max_thinking_steps: int = -1
  asked: str = ""
  amount: int = 0

  @property
  def forced(self) -> bool:
    """Tests if the thinking has a maximum."""
    return max(self.max_thinking_tokens, self.max_thinking_steps) >= 0

  @property
  def name(self) -> str:
    if self.asked:
      return (f"ask_{self.asked}" + f"_{self.amount}" * (self.amount > 0)
              + "_forced" * self.forced)
    parts = [f"waits_{self.num_waits}"] * (self.num_waits > 0) + [
        f"max_{self.max_thinking_tokens}"] * (self.max_thinking_tokens >= 0)
    return "_".join(parts) or "free"


def cells(
    max_thinking_tokens: Sequence[int], num_waits: Sequence[int],
    wait_maxima: Sequence[int] = (),
) -> list[Cell]:
  """Lists the free cell, one per maximum, and those with waits; each once.

  Args:
    max_thinking_tokens: maxima of the cells without waits.
    num_waits: numbers of waits.
    wait_maxima: maxima of the cells with waits, each combined with each number
      of waits, and with none for comparison. By default the largest of all
      maxima: without one, a row that waits until its tokens are used up would
      have no answer.
  """
  wait_maxima = wait_maxima or (max(max_thinking_tokens, default=-1),)
  maxima = *max_thinking_tokens, *(wait_maxima if num_waits else ())
  # A dict keeps the first of equal cells and the order: a maximum may be asked
  # for twice.
  found = [Cell(), *(Cell(max_thinking_tokens=m) for m in maxima),
           *(Cell(max_thinking_tokens=m, num_waits=w)
             for m in wait_maxima for w in num_waits)]
  return list(dict.fromkeys(found))


def asking_cells(
    tokens: Sequence[int], steps: Sequence[int], classes: Sequence[str], *,
    forced: bool,
) -> list[Cell]:
  """Lists cells whose prompts ask for an amount of thinking.

  Args:
    tokens, steps: amounts.
    classes: "short", "long".
    forced: add each amount once more, with a budget that enforces it.
  """
  found = []
  for enforced in (False, True)[:1 + forced]:
    found += [Cell(asked="tokens", amount=n,
                   max_thinking_tokens=n if enforced else -1) for n in tokens]
    found += [Cell(asked="steps", amount=n,
                   max_thinking_steps=n if enforced else -1) for n in steps]
  return found + [Cell(asked=kind) for kind in classes]


@dataclasses.dataclass(frozen=True)
class Scored:
  """Completions of one cell with their scores, all [Q, M].

  Attributes:
    correct: bool.
    answers: str or None, canonical; all None without votes.
    tokens: int, number of tokens of the completion.
    thinking_tokens, thinking_steps: int, numbers in its thinking.
    finish: str, names of finish reasons.
    unscored: bool, the verifier timed out or failed; counted as wrong.
  """

  correct: np.ndarray
  answers: np.ndarray
  tokens: np.ndarray
  thinking_tokens: np.ndarray
  thinking_steps: np.ndarray
  finish: np.ndarray
  unscored: np.ndarray


# Fields of a record that the figures of a cell are made from.
SCORED_FROM = ("sample_id", "correct", "answer", "length", "think_length",
               "think_steps", "finish_reason", "status")


def scored(
    records: Sequence[Mapping[str, Any]], questions: int) -> Scored:
  """Collects the completions of a cell from records, by question, then sample.
  """
  column = lambda name, dtype: np.array(
      [record[name] for record in records], dtype).reshape(questions, -1)
  return Scored(
      correct=column("correct", bool), answers=column("answer", object),
      tokens=column("length", int),
      thinking_tokens=column("think_length", int),
      thinking_steps=column("think_steps", int),
      finish=column("finish_reason", object),
      unscored=np.isin(column("status", object), UNSCORED))


def accuracy(
    scores: Sequence[float] | np.ndarray, cluster: np.ndarray | None,
) -> dict[str, Any]:
  """Computes accuracy, standard error and n, as they are saved.

  Args:
    scores: [Q], the mean over each question's samples.
    cluster: [Q], equal for related questions, which count as fewer than
      independent ones; None: questions are independent.

  Returns:
    `n`, `accuracy`, `standard_error` (None for one question or one cluster,
    where it is undefined), and `num_clusters` if there are clusters.
  """
  found = statistics.estimate(np.asarray(scores), cluster)
  clusters = {} if cluster is None else {
      "num_clusters": len(np.unique(cluster))}
  return {"n": found.n, "accuracy": found.mean,
          "standard_error": None if math.isnan(found.error) else found.error,
          } | clusters


def in_clusters(figures: Mapping[str, Any]) -> str:
  """Writes `" in 25 clusters"`, to follow a cell's n; "" without clusters."""
  count = figures.get("num_clusters")
  return "" if count is None else f" in {count} cluster{'s' * (count != 1)}"


def cell_figures(
    cell: Cell, scored: Scored, pass_at: Sequence[int], *, votes: bool,
    cluster: np.ndarray | None = None,
) -> dict[str, Any]:
  """Computes accuracy with its error, pass@k, maj@k, lengths and control.

  Args:
    cell: the setting.
    scored: its completions.
    pass_at: values of k.
    votes: true if there are answers to vote with.
    cluster: [Q], see `accuracy`.
  """
  samples = scored.correct.shape[1]
  figures = {
      "name": cell.name, "max_thinking_tokens": cell.max_thinking_tokens,
      "num_waits": cell.num_waits,
      "max_thinking_steps": cell.max_thinking_steps, "asked": cell.asked,
      "amount": cell.amount, "samples": samples,
      **accuracy(scored.correct.mean(axis=1), cluster),
      "unscored": int(scored.unscored.sum()),
      "mean_thinking_tokens": float(scored.thinking_tokens.mean()),
      "median_thinking_tokens": float(np.median(scored.thinking_tokens)),
      "p95_thinking_tokens": float(np.quantile(scored.thinking_tokens, 0.95)),
      "mean_thinking_steps": float(scored.thinking_steps.mean()),
      "mean_tokens": float(scored.tokens.mean()),
      "finish": {name: float(np.mean(scored.finish == name))
                 for name in ("eos", "budget", "length", "stop")},
      "pass@k": {str(k): float(np.mean([
          statistics.pass_at_k(samples, int(row.sum()), k)
          for row in scored.correct])) for k in pass_at}}
  if votes:
    figures["no_answer"] = float(np.mean(scored.answers == None))  # noqa: E711
    figures["maj@k"] = {
        str(k): float(np.mean(_majority(scored, k))) for k in pass_at}
  if cell.amount or cell.max_thinking_tokens >= 0:
    spent = (scored.thinking_steps if cell.asked == "steps"
             else scored.thinking_tokens)
    figures["control"] = scaling.control(
        spent.ravel(), np.array(cell.amount or cell.max_thinking_tokens))
  return figures


def s1_figures(
    figures: Sequence[Mapping[str, Any]], scored: Mapping[Cell, Scored],
) -> dict[str, Any]:
  """Computes s1's Control, Scaling and Performance over the maxima, and flips.

  Scaling is in accuracy (1 = 100 points); a curve of one point has none.
  """
  # s1's curve: cells that differ in the maximum only.
  curve = [f for f in figures if f["max_thinking_tokens"] >= 0
           and not (f["num_waits"] or f["asked"])]
  maxima = dict.fromkeys(c.max_thinking_tokens for c in scored if c.num_waits)
  summary: dict[str, Any] = {
      "flips": [flip for maximum in maxima for flip in _flips(scored, maximum)]}
  if curve:
    summary |= _over(curve) | {
        "control_per_sample": _mean_control(curve),
        "control_per_run": scaling.control(
            *_columns(curve, "mean_thinking_tokens", "max_thinking_tokens"))}
  asking = asking_figures(figures)
  return summary | ({"asking": asking} if asking else {})


def _flips(
    scored: Mapping[Cell, Scored], maximum: int) -> list[dict[str, Any]]:
  """Counts flips from each number of waits to the next, under one maximum."""
  waits = sorted((c for c in scored if c.max_thinking_tokens == maximum
                  and c.max_thinking_steps < 0 and not c.asked),
                 key=lambda cell: cell.num_waits)
  return [{"max_thinking_tokens": maximum, "from_waits": a.num_waits,
           "to_waits": b.num_waits, **scaling.flips(
               scored[a].correct, scored[b].correct)._asdict()}
          for a, b in itertools.pairwise(waits)]


def waits_by_maximum(
    figures: Sequence[Mapping[str, Any]],
) -> dict[int, list[Mapping[str, Any]]]:
  """Groups cells that ask for nothing by the maximum of those with waits.

  Each series begins with the cell without waits, if there is one.
  """
  plain = [cell for cell in figures if not cell.get("asked")]
  maxima = dict.fromkeys(
      cell["max_thinking_tokens"] for cell in plain if cell["num_waits"])
  return {maximum: sorted(
      (cell for cell in plain if cell["max_thinking_tokens"] == maximum),
      key=lambda cell: cell["num_waits"]) for maximum in maxima}


def asking_figures(
    figures: Sequence[Mapping[str, Any]],
) -> dict[str, dict[str, Any]]:
  """Computes s1's conditional control (its table 3) for prompts that ask.

  Control per run is s1's: the mean thinking tokens keep to the amount, where a
  step counts as 100 tokens. For classes, the short one must have fewer tokens
  than the free cell, and the long one more. Control per sample counts each
  sample's tokens or steps.

  Returns:
    Figures by family: "tokens", "steps", the same with "_forced", "classes".
  """
  free = next(f for f in figures if f["name"] == "free")
  families: dict[str, list[Mapping[str, Any]]] = {}
  for cell in figures:
    if cell["asked"]:
      name = cell["asked"] if cell["amount"] else "classes"
      forced = max(cell["max_thinking_tokens"], cell["max_thinking_steps"])
      families.setdefault(name + "_forced" * (forced >= 0), []).append(cell)
  found = {}
  for name, family in families.items():
    # Classes have no amount, and so no control per sample.
    tokens, amounts = _columns(family, "mean_thinking_tokens", "amount")
    if name == "classes":
      longer = np.array([cell["asked"] == "long" for cell in family])
      than = tokens - free["mean_thinking_tokens"]
      control = {"control_per_run": float(
          np.mean(np.where(longer, than > 0, than < 0)))}
    else:
      each = TOKENS_PER_STEP if family[0]["asked"] == "steps" else 1
      control = {"control_per_sample": _mean_control(family),
                 "control_per_run": scaling.control(tokens, each * amounts)}
    found[name] = control | _over(family)
  return found


def _over(family: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
  """Computes Scaling and Performance over some cells."""
  tokens, accuracy = _columns(family, "mean_thinking_tokens", "accuracy")
  return {
      "scaling_per_doubling": scaling.scaling_per_doubling(tokens, accuracy),
      "scaling_per_1k": scaling.scaling_per_1k(tokens, accuracy),
      "performance": scaling.performance(accuracy)}


def _mean_control(family: Sequence[Mapping[str, Any]]) -> float:
  return float(np.mean([cell["control"] for cell in family]))


def _columns(
    family: Sequence[Mapping[str, Any]], *names: str,
) -> list[np.ndarray]:
  return [np.array([cell[name] for cell in family]) for name in names]


def majority_baseline(
    scored: Scored, cluster: np.ndarray | None = None,
) -> list[dict[str, Any]]:
  """Accuracy of a vote of 1..M free samples, and the tokens it spends."""
  return [{
      "samples": k, "mean_tokens": float(k * scored.thinking_tokens.mean()),
      **accuracy(_majority(scored, k), cluster)}
          for k in range(1, scored.correct.shape[1] + 1)]


def _majority(scored: Scored, k: int) -> np.ndarray:
  """Computes maj@k of every question, [Q]."""
  return np.array([
      statistics.maj_at_k(answers.tolist(), correct.tolist(), k)
      for answers, correct in zip(
          scored.answers, scored.correct, strict=True)])
