"""A conversation obeys its commands, and remembers what was answered."""

import io
import pathlib
import re

import pytest

from posttrain import config as config_lib
from posttrain.cli import chat
from posttrain.sampler import token_sampling
from posttrain.sampler.sampler import Limits
from tests import meshes

TINY = str(pathlib.Path(__file__).parents[2] / "configs/tiny.py")
TEMPLATE = (
    "{% for m in messages %}{{ m['content'] }} {% endfor %}"
    "{% if add_generation_prompt %}<think>{% endif %}")


@pytest.fixture
def talk(monkeypatch, tmp_path):
  one = meshes.one()
  monkeypatch.setattr(chat.sharding, "make_mesh", lambda *sizes, **more: one)
  template = tmp_path / "template.jinja"
  template.write_text(TEMPLATE)

  def run(*lines, chat_template=str(template)):
    config = config_lib.load(
        TINY + ":debug", [f"chat_template={chat_template}"])
    stream = io.StringIO()
    messages = chat.run(
        config, lines=lines, stream=stream, seed=3,
        params=token_sampling.SamplingParams(temperature=1.0),
        limits=Limits(max_tokens=24))
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


def test_without_turns_there_is_no_chat(talk):
  with pytest.raises(ValueError, match="has no turns"):
    talk("a", chat_template="plain")
