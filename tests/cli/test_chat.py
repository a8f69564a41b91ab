"""A conversation obeys its commands, and remembers what was answered."""

import io
import pathlib
import re

import pytest

from posttrain import config as config_lib
from posttrain import weights
from posttrain.cli import chat
from posttrain.sampler import token_sampling
from posttrain.sampler.sampler import Limits
from posttrain.stages import sampling
from tests import meshes

TINY = str(pathlib.Path(__file__).parents[2] / "configs/tiny.py")
TEMPLATE = (
    "{% for m in messages %}{{ m['content'] }} {% endfor %}"
    "{% if add_generation_prompt %}<think>{% endif %}")
# Every turn stays as it was.
KEPT = (
    "{% for m in messages %}{{ m['content'] }}"
    "{{ '</s>' if m['role'] == 'assistant' else ' : ' }}{% endfor %}")


@pytest.fixture
def talk(monkeypatch, tmp_path):
  one = meshes.one()
  monkeypatch.setattr(chat.sharding, "make_mesh", lambda *sizes, **more: one)
  template = tmp_path / "template.jinja"
  template.write_text(TEMPLATE)

  def run(*lines, chat_template=str(template), max_tokens=24,
          options=sampling.PLAIN):
    config = config_lib.load(
        TINY + ":debug", [f"chat_template={chat_template}"])
    stream = io.StringIO()
    messages = chat.run(
        config, lines=lines, stream=stream, seed=3, options=options,
        params=token_sampling.SamplingParams(temperature=1.0),
        limits=Limits(max_tokens=max_tokens))
    return messages, stream.getvalue()

  return run


def test_turns_are_remembered_without_their_thinking(talk):
  messages, text = talk("/budget 2", "6 5", "", "2 2", "/exit", "never")
  assert [m["role"] for m in messages] == ["user", "assistant"] * 2
  assert [m["content"] for m in messages[::2]] == ["6 5", "2 2"]
  # What was printed behind the closing that each thinking was forced to.
  behind = re.split(r"\[forced: [^]]*\]", text)[1:]
  assert [m["content"] for m in messages[1::2]] == [
      part.splitlines()[0].strip() for part in behind]
  assert text.count(" 2 of them thinking") == 2 and "never" not in text


def test_commands_change_the_turns_that_follow(talk):
  _, text = talk(
      "/budget 0", "6 5", "/budget off", "/tokens 9", "6 5", "/wait x",
      "/tokens 0", "/budget 20", "6 5", "/what", "/temperature -1",
      "/wait 99999", "/reset")
  assert " 0 of them thinking, 0 waits" in text
  assert "max_thinking_tokens -1" in text
  assert "invalid literal" in text and "/tokens: found 0, needed" in text
  # The turn is refused, and the conversation goes on.
  assert "leaves no room for an answer: 20 thinking" in text
  assert "/reset        forget" in text and (
      "/temperature: found -1.0, needed" in text)
  assert "/wait: found 99999, needed" in text
  assert text.rstrip().endswith("forgotten")


def test_ten_turns_compute_each_token_once(talk, tmp_path, monkeypatch):
  """All but the very last, which is not fed."""
  template = tmp_path / "kept.jinja"
  template.write_text(KEPT)
  made = []

  class Watched(chat.Chat):
    def __init__(self, renderer, *rest):
      made.append(self)
      super().__init__(renderer, *rest)

  monkeypatch.setattr(chat, "Chat", Watched)
  tokenizer = weights.tokenizer(config_lib.load(TINY + ":debug"), None)
  # Turns end, and do not think: what was thought is not given back.
  bias = {str(i): 3.0 for i in tokenizer.stop_ids} | {
      str(tokenizer.encode(text)[-1]): -1e9
      for text in ("<think>", "</think>")}
  messages, _ = talk(
      *(f"{n} {n + 1}" for n in range(10)), chat_template=str(template),
      max_tokens=400, options=sampling.PLAIN | {
          "logits_processor": "posttrain.sampler.logits_processors:token_bias",
          "logits_processor_args": bias})
  [watched] = made
  turns = [watched._sampled[i] for i in range(1, 20, 2)]
  assert all(ids[-1] in tokenizer.stop_ids for ids in turns)
  last = watched._renderer.prompt_tokens(
      {"messages": messages[:-1]}, watched._sampled)
  fed = watched.stats.prefilled_tokens + sum(len(ids) - 1 for ids in turns)
  assert fed == len(last) + len(turns[-1]) - 1
  assert watched.stats.prompt_tokens > 4 * watched.stats.prefilled_tokens


def test_without_turns_there_is_no_chat(talk):
  with pytest.raises(ValueError, match="has no turns"):
    talk("a", chat_template="plain")
