"""Samples completions of given prompts, and prints them while they are drawn.

It is no stage of a pipeline: the `sample` verb runs it with a preset's weights,
with those of a trained stage, or with those that a config starts with.
"""

import contextlib
import dataclasses
import json
import pathlib
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TextIO

import jax
import numpy as np
import rich.console
import rich.text
from ml_collections import config_dict

from posttrain import sharding, weights
from posttrain import workdir as workdir_lib
from posttrain.model.transformer import Transformer
from posttrain.sampler import (
  engine,
  requests,
  rollouts,
  sampler,
  token_sampling,
  transcript,
)
from posttrain.stages import sampling
from posttrain.telemetry import console as console_lib
from posttrain.text import instructions, thinking
from posttrain.text import tokenizer as tokenizer_lib
from posttrain.train import preemption

BATCH_ROWS = 64  # Completions decoded together.
CHUNK = 16  # Tokens between two looks; streaming wants few, speed many.
ROOM = 64  # Tokens that the room for prompts is a multiple of.
FACTS = ("length", "think_length", "wait_count", "finish_reason")


class StreamPrinter:
  """Prints one completion as it grows, with forced tokens marked.

  A character may need several tokens: text that may still change is held back.
  `in_thinking` tells if the prompt opened thinking, which is then dimmed; None:
  nothing is dimmed.
  """

  def __init__(
      self, tokenizer: tokenizer_lib.Tokenizer, ids: thinking.ThinkingIds,
      stream: TextIO, in_thinking: bool | None = None,
  ):
    self._in_thinking = in_thinking
    self._tokenizer = tokenizer
    self._ids = ids
    self._printed = 0
    self._console = rich.console.Console(
        file=stream, markup=False, emoji=False, highlight=False)

  def __call__(
      self, tokens: Sequence[int], provenance: Sequence[int], done: bool,
  ) -> None:
    """Prints what is new.

    Args:
      tokens, provenance: all so far that nothing can retract any more.
      done: the completion has ended.
    """
    # The stop token ends the text and is no part of it.
    stopped = bool(tokens) and tokens[-1] in self._tokenizer.stop_ids
    end = len(tokens) - stopped
    if end <= 0:
      return
    thought = slice(0, 0)
    if self._in_thinking is not None:
      thought = thinking.split(
          tokens[:end], provenance[:end], self._ids,
          in_thinking=self._in_thinking).thinking.touched
    parts = transcript.segments(
        self._tokenizer, tokens[:end], provenance[:end], self._ids, thought)
    text = "".join(part for part, _ in parts)
    # U+FFFD at the end is a character whose other bytes are still to come.
    settled = len(text) if done else len(text.rstrip("\ufffd"))
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
    else:  # Not through Rich, which would replace tabs.
      self._console.file.write(
          text if name in ("sampled", "thinking") else f"[{name}: {text}]")
    self._console.file.flush()


def run(
    config: config_dict.ConfigDict, rows: Sequence[Mapping[str, Any]], *,
    workdir: str | None = None, stage: str = "", output: str | None = None,
    params: token_sampling.SamplingParams, limits: sampler.Limits,
    options: Mapping[str, Any] = sampling.PLAIN, ask: str = "",
    num_samples: int = 1, seed: int = 0, cache_dtype: str = "compute",
    weights_dtype: str = "compute", stream: TextIO | None = None,
) -> list[dict[str, Any]]:
  """Samples, prints and returns completions.

  Args:
    config: resolved; of the workdir where there is one.
    rows: each with a `prompt` or `messages`.
    workdir: take the weights of a stage of this run.
    stage: which; "" for its last finished training stage, "init" for what
      the run started from.
    output: a JSONL file for the completions, written as they finish. What an
      interrupted run has left there is not drawn again.
    params, limits: how to sample, and how far.
    options: as `sampling.make_sampling_options` takes them.
    ask: an instruction to append to each prompt.
    num_samples: per prompt.
    seed: with the prompt's number and the sample's, what a draw depends on.
    cache_dtype, weights_dtype: see `sampler.Sampler`.
    stream: where to print; standard output by default.

  Returns:
    One record per completion: text, tokens, logprobs, provenance and ends; of
    a prompt that cannot run, an error.

  Raises:
    ValueError: no such weights, no prompt that can run, a tokenizer or chat
      template other than the one trained with, or nothing that steers so.
  """
  first = jax.process_index() == 0
  stream = stream or sys.stdout
  with jax.set_mesh(sharding.mesh_of(config.mesh)):
    renderer, model = weights.load_for_sampling(config, workdir, stage)
    ids = thinking.resolve(
        thinking.Thinking(**config.thinking), renderer.tokenizer)
    tables = sampling.make_tables(
        renderer.tokenizer, ids, options["suppress"])
    dtypes: dict[str, Any] = dict(
        cache_dtype=cache_dtype, weights_dtype=weights_dtype)
    how = sampler.Sampler(
        tables=tables, params=params, chunk=CHUNK,
        max_prompt_tokens=0, max_num_seqs=BATCH_ROWS, **dtypes,
        options=sampling.make_sampling_options(options, tables.vocab_size),
        before_chunk=preemption.leave_if_requested)
    if ask:
      tokenizer_lib.check_known(renderer.tokenizer, ask, "The instruction")
      rows = [instructions.ask(row, ask, config.thinking.start)
              for row in rows]
    prompts = [renderer.prompt_tokens(row) for row in rows]
    settings = dataclasses.asdict(params) | dataclasses.asdict(limits) | {
        "seed": seed} | dtypes | sampling.with_sources(options)
    asked = [
        how.options.apply(requests.Request(
            prompt=tuple(prompt), params=params,
            **dataclasses.asdict(limits), seed=seed, stage="sample",
            prompt_id=i, sample_id=sample), tables.wait_texts)
        for i, prompt in enumerate(prompts) for sample in range(num_samples)]
    queue = _Queue(renderer.tokenizer, how, output, settings)
    kept = lambda: (
        f"{queue.finished} of {len(asked)} completions are "
        + (f"in {output}, and the same command goes on" if output else
           "printed, and none is kept without --output"))
    with _told_at_sigterm(stream, kept):
      live = StreamPrinter(renderer.tokenizer, ids, stream) if (
          len(asked) == 1) else None
      for record in queue.records(model, asked, live):
        if first:
          _show(record, stream, "" if live else (
              f"{queue.finished} of {len(asked)}"))
  records = queue.ordered()
  if all("error" in record for record in records):
    raise ValueError(f"Every prompt failed. The first: {records[0]['error']}")
  return records


@contextlib.contextmanager
def _told_at_sigterm(
    stream: TextIO, kept: Callable[[], str]) -> Iterator[None]:
  """Tells what is kept, if SIGTERM ends the process between two chunks."""
  try:
    yield
  except preemption.Preempted:
    if jax.process_index() == 0:
      console_lib.Console(stream=stream).line(f"\nsample: SIGTERM; {kept()}.")
    raise


class _Queue:
  """Many completions, through an engine; those in the output file are kept."""

  def __init__(
      self, tokenizer: tokenizer_lib.Tokenizer, how: sampler.Sampler,
      output: str | None, settings: Mapping[str, Any],
  ):
    self._tokenizer, self._how = tokenizer, how
    self._output, self._settings = output, settings
    self._records: dict[tuple[int, int], dict[str, Any]] = {}

  @property
  def finished(self) -> int:
    return len(self._records)

  def ordered(self) -> list[dict[str, Any]]:
    """Lists the records by prompt, then by sample."""
    return [self._records[key] for key in sorted(self._records)]

  def records(
      self, model: Transformer, asked: Sequence[requests.Request],
      live: StreamPrinter | None = None,
  ) -> Iterator[dict[str, Any]]:
    """Yields the records that are not in the file, as completions finish.

    Each is appended to the file at once.

    Args:
      live: prints the only request's completion as it grows.
    """
    self._resume(asked)
    todo = [r for r in asked
            if (r.prompt_id, r.sample_id) not in self._records]
    first = jax.process_index() == 0
    if todo:
      with (open(self._output, "a") if self._output and first
            else contextlib.nullcontext()) as file:
        for done in self._drawn(model, todo, live):
          record = _record_of_completion(self._tokenizer, done, self._how)
          self._records[record["prompt_id"], record["sample_id"]] = record
          if file:
            print(_line(record, self._settings), file=file, flush=True)
          yield record
    if self._output and first:
      _write(self._output, self.ordered(), self._settings)

  def _drawn(
      self, model: Transformer, todo: Sequence[requests.Request],
      live: StreamPrinter | None,
  ) -> Iterator[requests.Completion]:
    longest = max(1, *(len(request.prompt) for request in todo))
    # Few sizes: each is compiled.
    how = dataclasses.replace(
        self._how, max_prompt_tokens=-(-longest // ROOM) * ROOM)
    queue = how.make_engine(model, todo)
    for request in todo:
      number = queue.submit(request)
    yield from watched(queue, number, live) if live else queue.results()

  def _resume(self, asked: Sequence[requests.Request]) -> None:
    """Takes the completions that an interrupted run has left in the file.

    Raises:
      ValueError: they have other prompts or settings.
    """
    path = pathlib.Path(self._output) if self._output else None
    there = bool(path and path.exists())
    if not sharding.of_first_host(np.array(there)) or not path:
      return
    wanted = {(r.prompt_id, r.sample_id): self._tokenizer.decode(
        list(r.prompt)) for r in asked}
    for line in path.read_text().splitlines():
      try:
        record = json.loads(line)
      except json.JSONDecodeError:  # A kill may leave half of a line.
        continue
      if "error" in record:
        continue
      key = record["prompt_id"], record["sample_id"]
      if (record.pop("settings", None) != self._settings
          or wanted.get(key) != record["prompt"]):
        raise ValueError(
            f"{path} has completions of other prompts or settings. Name "
            "another --output, or remove it.")
      self._records[key] = record


def watched(
    queue: engine.Engine, number: int, live: StreamPrinter,
) -> Iterator[requests.Completion]:
  """Yields the completion of the only request, printed as it grows."""
  tokens: list[int] = []
  provenance: list[int] = []
  for new, kinds in queue.stream(number):
    tokens += new
    provenance += kinds
    if jax.process_index() == 0:
      live(tokens, provenance, done=False)
  for done in queue.results():
    if jax.process_index() == 0:
      live(done.tokens, done.provenance.tolist(), done=True)
    yield done


def _line(record: Mapping[str, Any], settings: Mapping[str, Any]) -> str:
  return json.dumps(
      {**record, "settings": settings}, ensure_ascii=False)


def _write(
    output: str, records: Sequence[Mapping[str, Any]],
    settings: Mapping[str, Any],
) -> None:
  workdir_lib.replace_file(pathlib.Path(output), "".join(
      f"{_line(record, settings)}\n" for record in records).encode())


def _record_of_completion(
    tokenizer: tokenizer_lib.Tokenizer, done: requests.Completion,
    how: sampler.Sampler,
) -> dict[str, Any]:
  if done.error:  # Only this request failed.
    return {"prompt_id": done.request.prompt_id,
            "sample_id": done.request.sample_id,
            "prompt": tokenizer.decode(list(done.request.prompt)),
            "error": done.error}
  columns = {name: getattr(done, name) for name in (
      "logprobs", "provenance", "entropy", "confidence")}
  return transcript.record(
      tokenizer, rollouts.of_completions([done]), 0, how.tables.ids,
      how.options.confidence) | {"tokens": done.tokens} | {
          name: values.tolist() for name, values in columns.items()
          if values is not None}


def _show(record: Mapping[str, Any], stream: TextIO, progress: str) -> None:
  """Prints a record; of one that was watched (no `progress`), the facts."""
  console = console_lib.Console(stream=stream)
  if not progress and "error" not in record:
    console.line("")
    return console.line(
        "  ".join(f"{k} {record[k]}" for k in FACTS), "dim")
  name = (f"prompt {record['prompt_id']}, sample {record['sample_id']} "
          f"({progress})")
  if "error" in record:
    return console.line(f"{name}: {record['error']}", "red")
  return console.sample(
      name, record["segments"], prompt=record["prompt"],
      facts={key: record[key] for key in FACTS})
