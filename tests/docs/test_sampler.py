"""The code of docs/sampler.md is run."""

import pathlib
import re

import jax
import numpy as np

from posttrain.sampler import budget_state, confidence
from posttrain.sampler.requests import Request
from posttrain.stages import sampling
from tests import meshes
from tests.model import build
from tests.sampler import engine_scene as scene

PAGE = (pathlib.Path(__file__).parents[2] / "docs/sampler.md").read_text()
USE, CONTINUE, PROCESSOR, SCHEDULE, UNSURE = re.findall(
    r"```python\n(.*?)```", PAGE, re.S)


class Letters:
  """A tokenizer in which each token is a letter; other characters are 0."""

  vocab_size, controls, stop_ids, words = scene.V, {}, (), False
  unk_id = None

  def decode(self, tokens):
    return "".join(chr(64 + t) for t in tokens)

  def encode(self, text, **_):
    return [ord(letter) - 64 if "A" <= letter <= "Z" else 0
            for letter in text.upper()]

  def token_bytes(self, token):
    return self.decode([token]).encode()


def test_the_engine_of_the_page_answers(capsys):
  with jax.set_mesh(meshes.one()):
    exec(USE, {
        "model": build.load(scene.CONFIG, scene.params()),
        "tables": scene.STRINGS.tables(), "prompts": [[12, 13], [14, 3]],
        "tokenizer": Letters()})
  lines = capsys.readouterr().out.splitlines()
  programs = [line for line in lines if line.startswith("compiled ")]
  answers = [line.split() for line in lines if line not in programs]
  assert programs and len(answers) == 16
  assert {reason for _, reason, *_ in answers} <= {
      "eos", "budget", "length", "stop"}


def test_the_continuation_and_the_forks_of_the_page_go_on():
  with jax.set_mesh(meshes.one()):
    engine = scene.make_engine(prefix_cache_tokens=1000)
    engine.submit(Request(prompt=(12, 13), max_tokens=8, keep=True))
    names = {"engine": engine, "tokenizer": Letters()}
    exec(CONTINUE, names)
    answer, *branches = sorted(engine.results(), key=lambda done: done.id)
  before = (12, 13, *names["turn"].tokens)
  assert answer.request.prompt == (*before, *Letters().encode("And then?"))
  assert [done.id for done in branches] == names["branches"]
  assert all(done.request.prompt == before for done in branches)
  assert all(done.tokens and not done.error for done in (answer, *branches))


def test_the_processor_and_the_schedule_of_the_page_do_what_they_say(tmp_path):
  """They come from a file, by name, as a config has them."""
  file = tmp_path / "my_hooks.py"
  file.write_text(PROCESSOR + SCHEDULE)
  named = sampling.make_sampling_options(
      dict(sampling.PLAIN, logits_processor=f"{file}:no_repeats",
           budget_schedule=f"{file}:patience"), scene.V)
  with jax.set_mesh(meshes.one()):
    busy = scene.make_engine(
        max_seq_len=256, logits_processor=named.logits_processor,
        budget_schedule=named.budget_schedule)
    found = scene.take(busy, [Request(
        prompt=(12, 3), max_tokens=200, num_waits=2, prompt_id=i)
                              for i in range(8)])
  assert sum(done.wait_count > 0 for done in found) > 2
  for done in found:
    assert not done.wait_count or done.think_length <= 64
    for a, b, source in zip(done.tokens, done.tokens[1:], done.provenance[1:],
                            strict=False):
      assert a != b or source == 2


def test_the_thinking_of_a_row_that_is_unsure_is_closed(tmp_path):
  """Behind the token that follows the first window below the bar."""
  file = tmp_path / "my_hooks.py"
  # A bar among the confidences of this model, with its 31 tokens.
  file.write_text(SCHEDULE + UNSURE.replace("12.0", "2.2"))
  schedule = sampling.make_sampling_options(
      dict(sampling.PLAIN, budget_schedule=f"{file}:unsure"),
      scene.V).budget_schedule
  settings = confidence.Confidence(top_k=5, window=4)
  asked = [Request(prompt=(12, 3), max_tokens=40, prompt_id=i)
           for i in range(12)]
  with jax.set_mesh(meshes.one()):
    free = scene.take(scene.make_engine(confidence=settings), asked)
    found = scene.take(scene.make_engine(
        confidence=settings, budget_schedule=schedule), asked)
  closed = 0
  for done, want in zip(found, free, strict=True):
    at = np.flatnonzero(want.provenance == budget_state.SAMPLED)
    below = np.flatnonzero(
        confidence.groups(want.confidence[at], 4) < 2.2)
    # The index behind the token that follows the window's last.
    end = at[below[0] + 3] + 2 if below.size else len(want.tokens)
    if end > want.think_length:
      assert done.tokens == want.tokens  # It had ended by itself, or never.
      continue
    closed += 1
    assert done.think_end == "budget" and done.think_length == end
    assert done.tokens[:end] == want.tokens[:end]
    closing = (*scene.STRINGS.newline, *scene.STRINGS.end,
               *scene.STRINGS.final_answer)
    assert tuple(done.tokens[end:end + len(closing)]) in (
        closing, closing[1:])  # No newline behind one.
  assert closed > 2
