"""Streaming prints the sampled text, and only when it is settled."""

import io
import itertools
import json
import pathlib

import hypothesis
import pytest
from hypothesis import strategies as st

from posttrain import config as config_lib
from posttrain import workdir as workdir_lib
from posttrain.cli import sample
from posttrain.sampler import token_sampling
from posttrain.sampler.sampler import Limits
from posttrain.stages import sampling
from posttrain.text import thinking
from posttrain.train import preemption
from tests import meshes
from tests.text import build

TINY = str(pathlib.Path(__file__).parents[2] / "configs/tiny.py")
STOP = 0
IDS = build.alone(
    size=256, start=(1,), end=(2, 3), delimiters=((2, 3),), wait=(87, 97))


class Bytes:
  """A tokenizer of bytes: characters may need several tokens."""

  stop_ids = (STOP,)

  def decode(self, tokens):
    return bytes(tokens).decode(errors="replace")


@hypothesis.settings(deadline=None)
@hypothesis.given(
    st.text(min_size=1, max_size=12).filter(lambda t: "\0" not in t),
    st.data())
def test_chunks_of_any_size_print_the_text_once(text, data):
  tokens = list(text.encode())
  shown = sorted(data.draw(st.sets(st.integers(0, len(tokens)))))
  stream = io.StringIO()
  printer = sample.StreamPrinter(Bytes(), IDS, stream)
  for n in shown:
    printer(tokens[:n], [1] * n, done=False)
  printer([*tokens, STOP], [1] * (len(tokens) + 1), done=True)
  printed = stream.getvalue()
  assert printed == sample.console_lib.printable(text)


def test_forced_tokens_and_waits_are_marked():
  stream = io.StringIO()
  printer = sample.StreamPrinter(Bytes(), IDS, stream)
  printer([72, 105], [1, 1], done=False)
  assert stream.getvalue() == "Hi"
  printer([72, 105, 87, 97, 33, 34], [1, 1, 2, 2, 1, 2], done=True)
  assert stream.getvalue() == 'Hi[wait: Wa]![forced: "]'


def test_a_token_that_a_delimiter_may_begin_in_is_held_back():
  tokenizer = build.merging()
  ids = thinking.resolve(thinking.Thinking(end="</think>"), tokenizer)
  stream = io.StringIO()
  printer = sample.StreamPrinter(tokenizer, ids, stream, in_thinking=True)
  tokens = tokenizer.encode("so it is.</think>\nThe answer")
  assert ".</" in map(tokenizer.token_text, tokens)
  shown = []
  for n in range(len(tokens) + 1):
    final = tokens[:thinking.settled(tokens[:n], ids)]
    printer(final, [1] * len(final), done=False)
    shown.append(stream.getvalue())
  assert "so it is" in shown and shown[-1] == "so it is.</think>\nThe answer"
  assert not any("." in text and "</think>" not in text for text in shown)


def test_a_completion_of_no_token_prints_nothing():
  """A maximum of 0 truncates so, and logits that are not finite do."""
  stream = io.StringIO()
  printer = sample.StreamPrinter(Bytes(), IDS, stream, in_thinking=True)
  printer([], [], done=False)
  printer([], [], done=True)
  assert stream.getvalue() == ""


@pytest.fixture
def config(monkeypatch):
  one = meshes.one()
  monkeypatch.setattr(sample.sharding, "make_mesh", lambda *sizes, **more: one)
  return config_lib.load(TINY + ":debug")


def run(config, rows, stream=None, **kwargs):
  stream = stream or io.StringIO()
  records = sample.run(
      config, rows, stream=stream,
      params=token_sampling.SamplingParams(temperature=1.0),
      limits=Limits(max_tokens=12, max_thinking_tokens=5), **kwargs)
  return records, stream.getvalue()


def test_a_thinking_that_is_cut_at_once_is_a_record(config):
  [record] = sample.run(
      config, [{"prompt": "6 5 2 2 : 1 <think>"}], stream=io.StringIO(),
      params=token_sampling.SamplingParams(), limits=Limits(
          max_tokens=12, max_thinking_tokens=0, truncate=True))
  assert record["tokens"] == [] and record["completion"] == ""
  assert record["finish_reason"] == "length" and record["segments"] == []


def test_completions_are_printed_written_and_returned(config, tmp_path):
  rows = [{"prompt": "6 5 2 2 : 1 <think>"}, {"prompt": "3 3 3 3 : 0 <think>"}]
  output = tmp_path / "out.jsonl"
  records, text = run(config, rows, num_samples=2, output=str(output))
  written = [json.loads(line) for line in output.open()]
  assert {w.pop("settings")["seed"] for w in written} == {0}
  assert written == json.loads(json.dumps(records))
  assert [(r["prompt_id"], r["sample_id"]) for r in records] == [
      (0, 0), (0, 1), (1, 0), (1, 1)]
  for record in records:
    assert all(part in text for part, _ in record["segments"])
    assert len(record["logprobs"]) == record["length"] <= 12
    assert record["think_length"] <= 5
  # The same prompt alone, and streamed: the same draw.
  workdir_lib.create(tmp_path / "run", config, devices=[])
  [alone], streamed = run(
      config, rows[:1], workdir=str(tmp_path / "run"), stage="init")
  assert alone["tokens"] == records[0]["tokens"]
  assert f"length {alone['length']}" in streamed
  assert streamed.partition("\nlength")[0] == "".join(
      part if name == "sampled" else f"[{name}: {part}]"
      for part, name in alone["segments"])


def test_an_interrupted_batch_goes_on(config, tmp_path):
  """Half of the file and a half line are left; the rest is drawn."""
  rows = [{"prompt": f"6 5 2 {i} : 1 <think>"} for i in range(5)]
  output = tmp_path / "out.jsonl"
  records, _ = run(config, rows, num_samples=2, output=str(output))
  lines = output.read_text().splitlines(keepends=True)
  output.write_text("".join([lines[3], lines[8], lines[1], lines[2][:30]]))
  again, text = run(config, rows, num_samples=2, output=str(output))
  assert [r["tokens"] for r in again] == [r["tokens"] for r in records]
  assert "(10 of 10)" in text and "(3 of 10)" not in text
  assert output.read_text().count("\n") == 10
  with pytest.raises(ValueError, match="other prompts or settings"):
    run(config, rows, num_samples=2, output=str(output), seed=1)


def test_left_at_sigterm_the_file_has_what_was_finished(
    config, tmp_path, monkeypatch):
  """One after the other, in a chunk each; before the third the signal comes."""
  rows = [{"prompt": f"6 5 2 {i} : 1 <think>"} for i in range(3)]
  whole, _ = run(config, rows, output=str(tmp_path / "whole.jsonl"))
  output, stream = tmp_path / "out.jsonl", io.StringIO()
  monkeypatch.setattr(sample, "BATCH_ROWS", 1)
  calls = itertools.count(1)
  monkeypatch.setattr(preemption, "requested", lambda: next(calls) == 3)
  with pytest.raises(preemption.Preempted) as left:
    run(config, rows, output=str(output), stream=stream)
  assert left.value.code == 75
  assert len(output.read_text().splitlines()) == 2
  assert (f"sample: SIGTERM; 2 of 3 completions are in {output}, and the same "
          "command goes on." in stream.getvalue())
  monkeypatch.setattr(preemption, "requested", lambda: False)
  again, _ = run(config, rows, output=str(output))
  assert [r["tokens"] for r in again] == [r["tokens"] for r in whole]
  monkeypatch.setattr(preemption, "requested", lambda: True)
  with pytest.raises(preemption.Preempted):
    run(config, rows[:1], stream=stream)
  assert "0 of 1 completions are printed, and none is kept" in stream.getvalue()


def test_a_prompt_that_cannot_run_errs_alone(config, tmp_path):
  """And is tried again with the same command."""
  rows = [{"prompt": "6 5 2 2 : 1 <think>"}, {"prompt": ""}]
  output = tmp_path / "out.jsonl"
  for _ in range(2):
    [good, bad], text = run(config, rows, output=str(output))
    assert good["length"] > 0 and "error" not in good
    assert bad == dict(prompt_id=1, sample_id=0, prompt="",
                       error="The prompt has no tokens.")
    assert "prompt 1, sample 0" in text and "no tokens" in text
    assert [json.loads(line).get("error") for line in output.open()] == [
        None, bad["error"]]
  with pytest.raises(ValueError, match="Every prompt failed"):
    run(config, [rows[1]] * 2)


@pytest.mark.parametrize("several", [False, True])
def test_prompts_ask_and_completions_are_steered(config, several, tmp_path):
  """A line as it streams, and a batch: asked, hooked, suppressed."""
  one = {"prompt": "6 5 2 2 : 1 <think>"}
  told = dict(
      sampling.PLAIN, suppress=("6", "5"), confidence_window=3,
      confidence_top_k=2,
      logits_processor="posttrain.sampler.logits_processors:token_bias",
      logits_processor_args={"0": 0.0})
  output = tmp_path / "out.jsonl"
  records, _ = run(config, [one] * (1 + several), options=told,
                   ask="3 3", output=str(output))
  for record in records:
    assert " ".join(record["prompt"].split()) == "6 5 2 2 : 1 3 3 <think>"
    thought = record["completion"].partition("</think>")[0].split()
    assert not {"5", "6"} & set(thought) and record["think_length"] > 2
    sampled = [value for value, source in zip(
        record["confidence"], record["provenance"], strict=True)
               if source == 1]
    assert len(record["entropy"]) == record["length"]
    assert record["tail_confidence"] == pytest.approx(sum(sampled[-3:]) / 3)
  settings = json.loads(output.open().readline())["settings"]
  assert settings["suppress"] == ["6", "5"]
  assert settings["logits_processor"] in settings["sources"]
  with pytest.raises(ValueError, match=r"has words that this vocabulary"):
    run(config, [one], ask="Think for up to 64 tokens.")


@pytest.mark.parametrize("stage, what", [
    ("", "finished training stage"), ("reason", "stage 'reason'")])
def test_weights_that_are_not_there(config, tmp_path, stage, what):
  workdir_lib.create(tmp_path, config, devices=[])
  with pytest.raises(ValueError, match=f"no checkpoint of a {what}"):
    run(config, [{"prompt": "1"}], workdir=str(tmp_path), stage=stage)
