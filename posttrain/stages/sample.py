"""Completions of given prompts, printed while they are drawn.

No stage of a pipeline: the `sample` verb runs it on a preset's weights, on a
trained stage of a workdir, or on what a config starts with.
"""

import json
import math
import pathlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any, TextIO

import jax
import numpy as np
import rich.console
import rich.text
from ml_collections import config_dict

from posttrain import sharding, weights
from posttrain import workdir as workdir_lib
from posttrain.model.transformer import Transformer
from posttrain.sampler import choice, rollouts, sampler, segments
from posttrain.stages import sampling
from posttrain.text import render, thinking
from posttrain.text import tokenizer as tokenizer_lib
from posttrain.train import console as console_lib

BATCH_ROWS = 64  # Completions decoded together.
CHUNK = 16  # Tokens between two looks; streaming wants few, speed many.


def run(
    config: config_dict.ConfigDict, rows: Sequence[Mapping[str, Any]], *,
    workdir: str | None = None, stage: str = "", output: str | None = None,
    params: choice.SamplingParams, limits: sampler.Limits,
    num_samples: int = 1, seed: int = 0, stream: TextIO | None = None,
) -> list[dict[str, Any]]:
  """Samples, prints and returns completions.

  Args:
    config: resolved; of the workdir where there is one.
    rows: each with a `prompt` or `messages`.
    workdir: take the weights of a stage of this run.
    stage: which; "" for its last finished training stage, "init" for what
      the run started from.
    output: a JSONL file for the completions.
    params, limits: how to sample, and how far.
    num_samples: per prompt.
    seed: with the prompt's number and the sample's, what a draw depends on.
    stream: where to print; standard output by default.

  Returns:
    One record per completion: text, tokens, logprobs, provenance and ends.

  Raises:
    ValueError: no such weights, a prompt or a budget that does not fit, or a
      tokenizer or chat template other than the one trained with.
  """
  first = jax.process_index() == 0
  stream = stream or sys.stdout
  with jax.set_mesh(sharding.make_mesh(
      config.mesh.fsdp, config.mesh.tensor, expert=config.mesh.expert)):
    renderer, model = _load(config, workdir, stage)
    ids = thinking.resolve(
        thinking.Thinking(**config.thinking), renderer.tokenizer)
    prompts = [renderer.prompt_tokens(row) for row in rows]
    longest = max(len(prompt) for prompt in prompts)
    how = sampler.Sampler(
        ids=ids, tables=sampling.make_tables(renderer.tokenizer, ids),
        params=params, max_prompt_tokens=-(-longest // 64) * 64, chunk=CHUNK)
    records: list[dict[str, Any]] = []
    size = max(1, BATCH_ROWS // num_samples)
    for start in range(0, len(prompts), size):
      batch = prompts[start:start + size]
      live = (Live(renderer.tokenizer, ids, stream)
              if first and len(batch) * num_samples == 1 else None)
      drawn = how.generate(
          model, batch, limits, group_size=num_samples, seed=seed,
          prompt_id=range(start, start + len(batch)), stage="sample",
          on_chunk=live)
      records += _records(renderer.tokenizer, drawn, ids)
      if first:
        _show(records[-len(drawn.lengths):], live, stream)
  if output and first:
    lines = (json.dumps(record, ensure_ascii=False) for record in records)
    workdir_lib.replace_file(
        pathlib.Path(output), "".join(f"{line}\n" for line in lines).encode())
  return records


class Live:
  """Prints one completion as it grows, forced tokens marked.

  A delimiter of several tokens may be taken back for a wait, and a character
  may need several tokens: what is not settled yet is held back.
  """

  def __init__(
      self, tokenizer: tokenizer_lib.Tokenizer, ids: thinking.ThinkingIds,
      stream: TextIO,
  ):
    self._tokenizer = tokenizer
    self._ids = ids
    self._held = max((len(d) for d in ids.delimiters), default=1) - 1
    self._printed = 0
    self._console = rich.console.Console(
        file=stream, markup=False, emoji=False, highlight=False)

  def __call__(self, recorder: rollouts.Recorder, done: np.ndarray) -> None:
    tokens, provenance = recorder.tokens[0], recorder.provenance[0]
    end = len(tokens) - self._held
    if done[0]:
      end = len(tokens) - (tokens[-1] in self._tokenizer.stop_ids)
    if end <= 0:
      return
    parts = segments.segments(
        self._tokenizer, tokens[:end], provenance[:end], self._ids)
    text = "".join(part for part, _ in parts)
    settled = len(text) if done[0] else len(text.rstrip("\ufffd"))
    position = 0
    for part, name in parts:
      begin = max(self._printed - position, 0)
      self._print(part[begin:settled - position], name)
      position += len(part)
    self._printed = max(self._printed, settled)

  def _print(self, text: str, name: str) -> None:
    if not text:
      return
    text = console_lib.printable(text)
    if self._console.is_terminal:
      self._console.print(
          rich.text.Text(text, style=console_lib.STYLES[name]), end="",
          soft_wrap=True)
    else:  # Without Rich, which would replace tabs.
      self._console.file.write(
          text if name == "sampled" else f"[{name}: {text}]")
    self._console.file.flush()


def _load(
    config: config_dict.ConfigDict, path: str | None, stage: str,
) -> tuple[render.Renderer, Transformer]:
  """The renderer and the weights, which must have been trained with it."""
  workdir = workdir_lib.open_existing(
      path, is_writer=False) if path else None
  tokenizer = weights.tokenizer(config, workdir)
  renderer = render.make_renderer(tokenizer, config.chat_template)
  shape = weights.model_config(config, tokenizer.vocab_size, workdir)
  if workdir is None or stage == "init":
    return renderer, weights.initial(config, shape, renderer.hash)
  return renderer, weights.of_stage(
      shape, workdir, weights.trained_stage(workdir, stage), renderer.hash)


def _records(
    tokenizer: tokenizer_lib.Tokenizer, drawn: rollouts.Rollouts,
    ids: thinking.ThinkingIds,
) -> list[dict[str, Any]]:
  return [
      segments.record(tokenizer, drawn, row, ids) | {
          "tokens": drawn.completion(row),
          "logprobs": [
              None if math.isnan(x) else x
              for x in drawn.logprobs[row, :length].tolist()],
          "provenance": drawn.provenance[row, :length].tolist()}
      for row, length in enumerate(drawn.lengths)]


def _show(
    records: Sequence[dict[str, Any]], live: Live | None, stream: TextIO,
) -> None:
  """Each completion with its facts; one printed already, the facts alone."""
  console = console_lib.Console(stream=stream)
  for record in records:
    facts = {key: record[key] for key in (
        "length", "think_length", "wait_count", "finish_reason")}
    if live is not None:
      console.line("")
      console.line("  ".join(f"{k} {v}" for k, v in facts.items()), "dim")
    else:
      console.sample(
          f"prompt {record['prompt_id']}, sample {record['sample_id']}",
          record["segments"], prompt=record["prompt"], facts=facts)
