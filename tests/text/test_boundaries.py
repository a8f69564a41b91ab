"""Delimiters that merge with their neighbours. Oracles: merges by hand."""

import io

import jax
import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from posttrain import config as config_lib
from posttrain import pipeline
from posttrain.cli import chat, sample
from posttrain.sampler import token_sampling
from posttrain.sampler.sampler import Limits
from posttrain.text import boundaries, render, thinking
from posttrain.text import tokenizer as tokenizer_lib
from tests import meshes, pipeline_run
from tests.text import build

# Qwen's: punctuation goes with the line breaks behind it and a space before.
SPLITTER = (
    r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+")
NEWLINE, SPACE = "\u010a", "\u0120"  # As byte-level BPE writes them.
THINK = thinking.Thinking(start="<think>", end="</think>", wait_text="Wait")
INNER = (("t", "h"), ("th", "i"), ("thi", "n"), ("thin", "k"), ("<", "/"))
ACROSS = ((".", "</"), (SPACE, "</"), (">", NEWLINE),
          (">" + NEWLINE, NEWLINE))


def qwen_like(merges=INNER + ACROSS, added=(), chat_template=None):
  """Bytes and these merges, with a stop token."""
  alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
  texts = [*alphabet, *("".join(pair) for pair in merges)]
  raw = tokenizers.Tokenizer(models.BPE(
      vocab={text: i for i, text in enumerate(texts)}, merges=list(merges)))
  raw.pre_tokenizer = pre_tokenizers.Sequence([
      pre_tokenizers.Split(tokenizers.Regex(SPLITTER), "isolated"),
      pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
  raw.decoder = decoders.ByteLevel()
  raw.add_special_tokens(["<|end|>"])
  raw.add_tokens([
      tokenizers.AddedToken(text, normalized=False) for text in added])
  return tokenizer_lib.HuggingFaceTokenizer(
      raw, bos_id=None, eos_id=raw.token_to_id("<|end|>"),
      chat_template=chat_template)


@pytest.mark.parametrize("text, is_seen", [
    ("so 18</think>18", True), ("so 18.</think>18", False),
    ("so 18 </think>18", False), ("so 18</think>\n18", False),
    ("so 18.</think>\n\n18", False), ("so 18\n</think>\n\n18", False)])
def test_closings_are_missed_where_they_merge(text, is_seen):
  """Five of six, in what SFT renders and a model so learns to write."""
  tokenizer = qwen_like()
  ids = thinking.resolve(THINK, tokenizer)
  tokens, mask = render.PlainRenderer(tokenizer).example_tokens(
      dict(prompt="6 times 3?", completion=text))
  found = thinking.split(
      tokens[mask], [1] * mask.sum(), ids, in_thinking=True)
  assert found.closed == is_seen
  assert "</think>" in tokenizer.decode(tokens[mask])


def test_such_a_delimiter_is_warned_about_with_the_remedy():
  told = boundaries.warning(THINK, qwen_like())
  assert "thinking.end='</think>'" in told and told.count("\n") == 0
  assert r"'</think>\n' is written as '</', 'think', '>\n'" in told
  assert "added token" in told and "tokenizer.symbols" in told
  assert 'thinking.end=""' in told
  # "<" has no merge before it, and ">" has one behind it.
  assert "thinking.start='<think>'" in told


@pytest.mark.parametrize("merges, is_safe", [
    (INNER, True), ((), True), ((*INNER, ("think", ">")), True),
    *(((*INNER, merge), False) for merge in ACROSS[:3])])
def test_one_merge_across_an_edge_is_enough(merges, is_safe):
  strings = thinking.Thinking(end="</think>")
  told = boundaries.warning(strings, qwen_like(merges))
  assert (told == "") == is_safe


@pytest.mark.parametrize("strings", [
    THINK, thinking.Thinking(),
    thinking.Thinking(start="<think>", end="</think>", delimiters=("<|end|>",)),
    # Forced only, and so never looked for.
    thinking.Thinking(end="</think>", wait_text=".</", final_answer=">\n")])
def test_added_tokens_never_merge(strings):
  tokenizer = qwen_like(added=("<think>", "</think>"))
  assert boundaries.warning(strings, tokenizer) == ""
  if "wait" not in strings.wait_text and not strings.delimiters:
    assert boundaries.warning(strings, build.chatml()) == ""


def test_every_delimiter_is_looked_at():
  tokenizer = qwen_like(added=("<think>", "</think>"))
  told = boundaries.warning(thinking.Thinking(
      start="<think>", end="</think>", delimiters=("</", "###")), tokenizer)
  assert "thinking.delimiters='</'" in told and "thinking.end" not in (
      told.replace('thinking.end=""', ""))
  assert "###" not in told


def test_a_word_goes_on_as_another_word():
  """ "answers" is not "answer" with an s behind it."""
  strings = thinking.Thinking(end="ab")
  assert boundaries.warning(strings, qwen_like((("a", "b"), ("ab", "a")))) == ""
  assert boundaries.warning(strings, qwen_like((("a", "b"), (SPACE, "ab"))))


@pytest.mark.parametrize("end", ["</think>", "OK"])
def test_words_of_a_word_vocabulary_do_not_merge(end):
  assert boundaries.warning(
      thinking.Thinking(start="<think>", end=end), build.words()) == ""


@pytest.fixture
def config(tmp_path):
  qwen_like(chat_template=build.CHATML).save(tmp_path / "tokenizer")
  return config_lib.assign(pipeline_run.CONFIG | dict(
      tokenizer=dict(path=str(tmp_path / "tokenizer")), chat_template="",
      thinking=dict()), [], "test")


def test_the_verbs_warn_once(config, tmp_path, monkeypatch, capsys):
  one = meshes.one()
  for verb in (sample, chat):
    monkeypatch.setattr(
        verb.sharding, "make_mesh", lambda *sizes, **more: one)
  how = dict(params=token_sampling.SamplingParams(),
      limits=Limits(max_tokens=1))
  said = {}
  stream = io.StringIO()
  chat.run(config, lines=[], stream=stream, **how)
  said["chat"] = stream.getvalue()
  stream = io.StringIO()
  monkeypatch.setattr(sample, "_live", lambda *_: {})
  sample.run(config, [dict(prompt="6")], stream=stream, **how)
  said["sample"] = stream.getvalue()
  capsys.readouterr()
  with jax.set_mesh(one):
    pipeline.set_up(config, str(tmp_path / "run"))
  said["train"] = capsys.readouterr().out
  pipeline.evaluate(config, str(tmp_path / "run"))  # No stage of that kind.
  said["eval"] = capsys.readouterr().out
  for verb, text in said.items():
    assert text.count("warning: thinking.start=") == 1, verb
