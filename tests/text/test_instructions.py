"""Instructions go behind the question, and words are whole tokens."""

import numpy as np
import pytest

from posttrain.text import instructions, thinking, tokenizer, vocabulary

TEXT = instructions.with_amount(instructions.TEXTS["tokens"], 512)
USER = {"role": "user", "content": "2 + 2?"}
TOLD = {"role": "assistant", "content": "4"}


def test_the_texts_are_s1s():
  """Its tasks have them as `{Q}\n\n...`."""
  assert instructions.ask({"prompt": "2 + 2?"}, TEXT) == {
      "prompt": "2 + 2?\n\nThink for up to 512 tokens."}
  assert instructions.with_amount(
      instructions.TEXTS["steps"], 16) == "Think for up to 16 steps."


@pytest.mark.parametrize("prompt, asked", [
    ("6 5 : 1 <think>", f"6 5 : 1\n\n{TEXT} <think>"),
    ("q\n<think>\n", f"q\n\n{TEXT}\n<think>\n"),
    ("<think>", f"\n\n{TEXT}<think>"),
    ("what is <think> for", f"what is <think> for\n\n{TEXT}"),
])
def test_a_bare_prompt_goes_on_to_open_the_thinking(prompt, asked):
  row = {"prompt": prompt, "id": 3}
  assert instructions.ask(row, TEXT, "<think>") == {"prompt": asked, "id": 3}
  assert row["prompt"] == prompt


@pytest.mark.parametrize("key", ["messages", "prompt"])
def test_the_users_last_message_asks(key):
  row = instructions.ask({key: [USER, TOLD, USER, TOLD]}, TEXT)
  assert row[key] == [
      USER, TOLD, USER | {"content": f"2 + 2?\n\n{TEXT}"}, TOLD]
  with pytest.raises(ValueError, match="none among 1"):
    instructions.ask({key: [TOLD]}, TEXT)


def test_a_question_in_parts_asks():
  parts = [{"type": "text", "text": "2 "}, {"type": "text", "text": "+ 2?"}]
  row = instructions.ask(
      {"messages": [{"role": "user", "content": parts}]}, TEXT)
  assert row["messages"] == [USER | {"content": f"2 + 2?\n\n{TEXT}"}]


WORDS = vocabulary.train_sentencepiece(
    ["wait Wait, await (wait) hm Hm think so"], model_type="word",
    symbols=("<think>", "</think>"))


def test_a_word_is_suppressed_however_it_is_written():
  found = tokenizer.spellings(WORDS, ["WAIT", "hm"])
  assert {WORDS.token_text(i).strip() for i in np.flatnonzero(found)} == {
      "wait", "Wait,", "(wait)", "hm", "Hm"}
  with pytest.raises(ValueError, match="is the word 'alternatively'"):
    tokenizer.spellings(WORDS, ["hm", "alternatively"])
  with pytest.raises(ValueError, match="is the word '!'"):
    tokenizer.spellings(WORDS, ["!"])


def test_what_cannot_be_read_is_not_asked():
  tokenizer.check_known(WORDS, "think so", "The instruction")
  with pytest.raises(ValueError, match="'think hard' has words"):
    tokenizer.check_known(WORDS, "think hard", "The instruction")


def test_a_step_of_a_vocabulary_of_words_is_that_word():
  """ "await" and "(wait)" are other words."""
  ids = thinking.resolve(thinking.Thinking(
      start="<think>", end="</think>", wait_text="wait", step="wait"), WORDS)
  assert ids.strings.step == tuple(256 + i for i in ids.wait)
  plain = thinking.resolve(thinking.Thinking(
      start="<think>", end="</think>", wait_text="wait"), WORDS)
  assert plain.strings.step == ()
