"""Evaluation: accuracy as a function of thinking, for several checkpoints.

Every checkpoint answers the same problems in every cell (a budget, or a
number of forced waits) with the same random bits. So differences between cells
and between checkpoints are paired. One JSON file per checkpoint holds
the figures and every completion; `curve.svg` shows them. A cell that is
finished is kept at once (`evaluation_cells`).
"""

import functools
import pathlib
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from ml_collections import config_dict

from posttrain import config as config_lib
from posttrain import sharding
from posttrain import workdir as workdir_lib
from posttrain.config.stages.evaluate import SCHEMA
from posttrain.config.stages.sampling import SINGLE_TURN
from posttrain.episodes import records as episode_records
from posttrain.episodes import rollouts as episode_rollouts
from posttrain.episodes import score_calls
from posttrain.episodes.call import Call, Result
from posttrain.episodes.calls import Calls
from posttrain.episodes.trajectory import Trajectory
from posttrain.evaluation import scaling_plot, statistics, summary
from posttrain.model.transformer import Transformer
from posttrain.sampler import transcript
from posttrain.stages import episodes, journals, training
from posttrain.stages import evaluation_cells as cells_lib
from posttrain.stages import problems as problems_lib
from posttrain.stages.run_context import RunContext
from posttrain.stages.stage import Stage, stage_of
from posttrain.tasks import scoring
from posttrain.telemetry import metrics as metrics_lib
from posttrain.text import instructions
from posttrain.text import tokenizer as tokenizer_lib
from posttrain.train import preemption


def run(
    context: RunContext, start: Transformer | None) -> Transformer | None:
  """Evaluates every checkpoint that has no result yet; returns `start`.

  Raises:
    ValueError: the problems, the verifier or the budgets do not fit.
    Preempted: SIGTERM came; cells that are finished are kept.
  """
  results = {}
  with journals.kept(context), episodes.open_calls(context) as calls:
    evaluation = Evaluation(context, calls)
    try:
      for name in checkpoints_of(context):
        results[name] = _result(evaluation, context, name)
    except preemption.Preempted:
      context.leave(
          "the cells that are finished are kept, and so is what the calls of "
          "the one under way gave")
  log(context, results)
  if context.workdir.is_writer:
    context.workdir.write_text(
        f"{context.name}/eval/curve.svg", scaling_plot.standalone(
            scaling_plot.coloured(
                (name, "", result) for name, result in results.items())))
  context.workdir.finish(context.name, {
      name: {cell["name"]: cell["accuracy"] for cell in result["cells"]}
      for name, result in results.items()})
  evaluation.kept.clear()
  return start


def _result(
    evaluation: "Evaluation", context: RunContext, name: str,
) -> dict[str, Any]:
  """Reads one checkpoint's result, or evaluates it if there is none."""
  file = result_file(context, name)
  # The first host decides: a file may show up late on the others.
  there = bool(sharding.of_first_host(np.array(file.exists())))
  if there and not context.again:
    return workdir_lib.read_object(file, "cells")
  context.console.line(f"{context.name}: evaluating {name}")
  result = evaluation.evaluate(
      label(name), functools.cache(lambda: context.weights_of(name)))
  context.workdir.write_json(file.relative_to(context.workdir.path), result)
  return result


def checkpoints_of(context: RunContext) -> tuple[str, ...]:
  """Lists the section's checkpoints; by default "init" and trained stages."""
  stages, config = context.config.stages, context.config
  before = stages[:stages.index(context.name)]
  return tuple(context.section.checkpoints) or (
      "init", *(name for name in before
                if stage_of(config[name].kind).schema.trains))


def finished(context: RunContext) -> int | None:
  """Counts the results; None where one that was made is missing."""
  summary = context.workdir.finished(context.name)
  for checkpoint in summary or ():
    file = result_file(context, checkpoint)
    if not file.exists():
      context.console.warning(f"{file} is missing, and is made again")
      return None
  return None if summary is None else len(summary)


def result_file(context: RunContext, checkpoint: str) -> pathlib.Path:
  """Returns the file of a checkpoint's figures and completions."""
  return context.workdir.path / context.name / "eval" / (
      f"{label(checkpoint)}.json")


def label(checkpoint: str) -> str:
  """Converts a checkpoint's name to that of a file."""
  return re.sub(r"[^\w.-]+", "_", checkpoint).strip("_")


class Evaluation:
  """The problems and how they are asked; the model is what varies."""

  def __init__(self, context: RunContext, calls: Calls):
    section = context.section
    self.context, self.section = context, section
    self.problems = problems_lib.load_on_all_hosts(
        context, section.problems.count)
    self.rows = {row["id"]: row for row in self.problems}
    self.cluster = clusters(self.problems)
    if self.cluster is not None:
      remark = statistics.caution(len(np.unique(self.cluster)))
      if remark:
        context.console.warning(f"{context.name}: {remark}")
    self.cells = cells_lib.cells_of(section)
    self.sampler = episodes.make_sampler(context, calls)
    self.kept = cells_lib.KeptCells(context)
    self.journals = journals.Journals(context)

  def evaluate(
      self, name: str, weights: Callable[[], Transformer]) -> dict[str, Any]:
    """Evaluates all cells of one checkpoint: figures and records.

    A completion counts as correct only if the verifier gives 1. None (not
    applicable) is null in the record and counts as wrong, and so does a
    completion that the verifier could not judge. `n` counts all problems, so
    that cells and checkpoints are compared on the same ones; `unscored` counts
    the completions without a score.

    Args:
      name: of the checkpoint, as that of a file.
      weights: called where a cell is not there yet.
    """
    scored, figures, records = {}, [], []
    baseline, more = [], []  # Of the votes, and of their further samples.
    votes = self.section.majority.max_samples
    samples = self.section.samples_per_problem
    for cell in self.cells:
      rows = self._records(name, cell, weights)
      drawn = summary.scored(rows, len(self.problems))
      if cell == summary.Cell() and votes:
        baseline = summary.majority_baseline(
            _first(drawn, votes), self.cluster)
        more = [row for row in rows if row["sample_id"] >= samples]
      scored[cell] = drawn = _first(drawn, samples)
      figures.append(summary.cell_figures(
          cell, drawn, self.section.pass_at, votes=bool(self.section.extract),
          cluster=self.cluster))
      records += [row for row in rows if row["sample_id"] < samples]
      self.context.console.line(_line(name, figures[-1]))
    return {
        "checkpoint": name, "decoding": self._decoding(),
        "section": config_lib.jsonable(self.section), "cells": figures,
        "summary": summary.s1_figures(figures, scored) | {
            "majority_baseline": baseline}
        | problems_lib.constant_baseline(
            self.section, len(self.problems), self.cluster),
        "records": records, "majority_records": more}

  def _records(
      self, name: str, cell: summary.Cell,
      weights: Callable[[], Transformer]) -> cells_lib.Records:
    """A cell's completions: kept ones, or drawn and then kept."""
    found = self.kept.read(name, cell)
    if found is None:
      model, journal = weights(), self.journals.of_cell(name, cell.name)
      with self.sampler.calls.recorded(journal):
        found = self._answer(model, cell)
      self.kept.write(name, cell, found)
      if journal:
        journal.remove()
    return found

  def _decoding(self) -> dict[str, Any]:
    """Collects the decoding parameters of a figure."""
    rollout = self.section.rollout
    options = config_lib.jsonable(training.pick(
        rollout, "suppress logits_processor logits_processor_args "
        "budget_schedule wait_order"))
    if self.section.episode != SINGLE_TURN:
      options |= config_lib.jsonable(training.pick(
          self.section, "episode episode_args"))
      options["max_episode_tokens"] = rollout.max_episode_tokens
    return training.pick(
        rollout, "temperature top_k top_p min_p max_tokens truncate") | {
            name: value for name, value in options.items()
            if value and value != "cycle"} | {
                "seed": self.context.config.seed,
                "task": self.section.problems.task,
                "split": self.section.problems.split}

  def _answer(
      self, model: Transformer, cell: summary.Cell) -> cells_lib.Records:
    """Asks every problem under the budgets of one cell.

    Returns:
      The scored completions in order of problem, then sample.
    """
    samples = cells_lib.samples_of(self.section, cell)
    found, _ = self.sampler.run(
        model, [asked_row(self.context, row, cell) for row in self.problems],
        cells_lib.limits_of(self.section, cell), group_size=samples,
        score=functools.partial(self._calls, samples))
    problems = [self.rows[each.prompt_id] for each in found]
    scores = self._scores(found)
    if scores.reasons:
      unscored = scoring.describe_unscored(
          scores, problems, [self.section.reward])
      self.context.console.warning(
          f"{self.context.name}, {cell.name}: {unscored}. They count as wrong.")
    answers = self._answers(
        cell, found, problems, scores.values[:, 0] == 1)
    rollouts = episode_rollouts.of_trajectories(found, branched=True)
    reasons = {row: reason for row, _, reason in scores.reasons}
    inner, records = self.sampler.sampler, []
    for row, (each, problem, answer, value, code) in enumerate(zip(
        found, problems, answers, scores.values[:, 0], scores.statuses[:, 0],
        strict=True)):
      record = transcript.record(
          self.context.renderer.tokenizer, rollouts, row, inner.tables.ids,
          inner.options.confidence, each.answer)
      record |= episode_records.details(each)
      record |= {"id": record["prompt_id"], "cell": cell.name,
                 "reward": None if np.isnan(value) else float(value),
                 "status": scoring.STATUSES[code],
                 "correct": bool(value == 1),
                 "answer": answer.answer}
      if row in reasons:
        record["reason"] = reasons[row]
      if answer.reason:
        record["extract_reason"] = answer.reason
      if self.cluster is not None:
        record["cluster"] = problem["cluster"]
      records.append(record)
    return records

  def _calls(
      self, samples: int, trajectory: Trajectory) -> list[tuple[str, Call]]:
    """Makes the calls that judge an episode that has ended."""
    completion = episode_records.completion_of(
        self.context.renderer.tokenizer, trajectory)
    section, number = self.section, trajectory.prompt_id
    [reward] = score_calls.calls(
        [section.reward], self.rows[number], completion,
        group=(number, samples))
    return [("reward", reward)] + ([(
        "extract", score_calls.extract_call(
            section.extract, completion.answer))] if section.extract else [])

  def _scores(self, found: Sequence[Trajectory]) -> scoring.Scores:
    """Collects scores [B, 1]; an episode that has failed has none."""
    return score_calls.of_results([[
        Result("error", reason=episode_records.failure_of(each))
        if each.outcome.reason == "error" else each.scores["reward"]]
                                   for each in found])

  def _answers(
      self, cell: summary.Cell, found: Sequence[Trajectory],
      problems: Sequence[Mapping[str, Any]], correct: np.ndarray,
  ) -> list[score_calls.Extracted]:
    """Collects the answers for votes, and warns of those that have failed.

    Raises:
      ValueError: a correct completion has no answer, by the extractor's word.
    """
    if not self.section.extract:
      return [score_calls.Extracted(None)] * len(found)
    answers = [score_calls.extracted(each.scores["extract"]) for each in found]
    for problem, right, each in zip(problems, correct, answers, strict=True):
      if right and each == score_calls.Extracted(None):
        raise ValueError(
            f"{self.section.extract} finds no answer in a completion of "
            f"problem {problem['id']}, to which {self.section.reward} gives 1. "
            "They should agree on what an answer is.")
    failed = score_calls.describe_failed(answers, problems)
    if failed:
      self.context.console.warning(
          f"{self.context.name}, {cell.name}: {failed}. They have no vote.")
    return answers


def check(context: RunContext) -> None:
  """Looks at problems and budgets before the first stage; on one host.

  Raises:
    ValueError: there are too few problems, one is not fit to be asked, or
      the budgets of a cell contradict each other.
  """
  section = context.section
  rows = problems_lib.load(context, section.problems.count)
  clusters(rows)
  episodes.check(context)
  cells = cells_lib.cells_of(section)
  for cell in cells:
    if cell.asked:
      tokenizer_lib.check_known(
          context.renderer.tokenizer, instruction(section, cell),
          "The instruction")
  problems_lib.check_budgets(
      context, [cells_lib.limits_of(section, cell) for cell in cells])
  # Cells that ask for no amount have the same prompts.
  kinds = [summary.Cell(), *(cell for cell in cells if cell.asked)]
  problems_lib.check(
      context, rows, [section.reward],
      lambda row: [context.renderer.prompt_tokens(
          asked_row(context, row, cell)) for cell in kinds],
      extract=section.extract)
  problems_lib.constant_baseline(section, len(rows), None)


def asked_row(
    context: RunContext, row: Mapping[str, Any], cell: summary.Cell,
) -> Mapping[str, Any]:
  """Returns a problem as a cell asks it."""
  return instructions.ask(
      row, instruction(context.section, cell),
      context.config.thinking.start) if cell.asked else row


def instruction(section: config_dict.ConfigDict, cell: summary.Cell) -> str:
  """Builds the instruction of a cell's prompts."""
  key = {"tokens": "token_text", "steps": "step_text", "short": "short_text",
         "long": "long_text"}[cell.asked]
  return instructions.with_amount(section.instructions[key], cell.amount)


def clusters(problems: Sequence[Mapping[str, Any]]) -> np.ndarray | None:
  """Returns the column `cluster` [Q] of a task's problems, or None.

  Raises:
    ValueError: some problems have one and some do not.
  """
  named = [problem.get("cluster") for problem in problems]
  missing = named.count(None)
  if missing == len(named):
    return None
  if missing:
    raise ValueError(
        f"{missing} of {len(named)} problems of the task have no `cluster`. "
        "Give it to all of them or to none.")
  return np.array(named)


def _first(scored: summary.Scored, samples: int) -> summary.Scored:
  return summary.Scored(**{
      name: values[:, :samples] for name, values in vars(scored).items()})


def _line(name: str, figures: Mapping[str, Any]) -> str:
  error = figures["standard_error"]
  return (
      f"  {name} {figures['name']}: accuracy {figures['accuracy']:.3f} +- "
      + ("n/a" if error is None else f"{error:.3f}")
      + f" (n {figures['n']}{summary.in_clusters(figures)}"
      + (f", {figures['unscored']} of {figures['n'] * figures['samples']} not "
         "scored" if figures["unscored"] else "") + "), thinking "
      f"{figures['mean_thinking_tokens']:.1f} tokens")


def log(context: RunContext, results: Mapping[str, Mapping]) -> None:
  """Writes one row of metrics.jsonl per checkpoint."""
  with metrics_lib.Writer(
      context.workdir.metrics, context.workdir.tensorboard, context.name,
      restored_step=0, check=context.workdir.check_known_lease) as writer:
    for step, (name, result) in enumerate(results.items(), start=1):
      row: dict[str, float] = {}
      for cell in result["cells"]:
        prefix = f"eval/{label(name)}/{cell['name']}"
        row |= {f"{prefix}/accuracy": cell["accuracy"],
                f"{prefix}/mean_thinking_tokens":
                cell["mean_thinking_tokens"],
                f"{prefix}/unscored": cell["unscored"]}
      writer.write(step, row)


STAGE = Stage(
    schema=SCHEMA, run=run, check=check, finished=finished,
    programs=cells_lib.programs, memory=cells_lib.memory,
    work=lambda section, mesh: [], leaves=("evaluations",))
