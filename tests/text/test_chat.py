"""Oracles: transcripts written by hand, and the mask read back as text."""

import jinja2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from posttrain.text import chat
from tests.text import build

CHATML, LLAMA, INST = build.chatml(), build.llama(), build.inst()
TALK = [
    {"role": "user", "content": "hello"},
    {"role": "assistant", "content": "how are you"},
    {"role": "user", "content": "42?"},
    {"role": "assistant", "content": "The answer is 42."},
]
FAMILIES = {
    "chatml": (CHATML, build.CHATML, "", "<|im_end|>"),
    "smollm2": (CHATML, build.SMOLLM2, "", "<|im_end|>"),
    "llama": (LLAMA, build.LLAMA3, "<|begin_of_text|>", "<|eot_id|>"),
    "inst": (INST, build.INST, "<s>", "</s>"),
}


def targets(tokenizer, tokens, mask):
  """The text of each run of tokens in the loss."""
  edges = np.flatnonzero(np.diff(mask)) + 1
  return [
      tokenizer.decode(run)
      for run, inside in zip(
          np.split(np.array(tokens), edges), np.split(mask, edges),
          strict=True) if inside[0]]


@pytest.mark.parametrize("name", FAMILIES)
def test_the_mask_covers_each_turn_and_its_end_and_nothing_else(name):
  tokenizer, source, bos, end = FAMILIES[name]
  template = chat.ChatTemplate(source, tokenizer)
  tokens, mask = template.example_tokens(TALK)
  lead = " " if name == "inst" else ""
  assert targets(tokenizer, tokens, mask) == [
      f"{lead}how are you{end}", f"{lead}The answer is 42.{end}"]
  assert tokenizer.decode(tokens) == template.render(TALK, False)
  assert tokens.count(tokenizer.bos_id) == (1 if bos else 0)


@pytest.mark.parametrize("name", FAMILIES)
def test_an_example_begins_with_what_the_sampler_is_given(name):
  tokenizer, source, _, _ = FAMILIES[name]
  template = chat.ChatTemplate(source, tokenizer)
  tokens, mask = template.example_tokens(TALK, last_only=True)
  prompt = template.prompt_tokens(TALK[:3])
  assert tokens[:len(prompt)] == prompt
  assert mask.index(True) == len(prompt)
  assert sum(mask) == len(tokens) - len(prompt) - (
      name in ("chatml", "smollm2"))  # The line break behind <|im_end|>.


def test_transcripts_written_by_hand():
  render = lambda name: chat.ChatTemplate(
      FAMILIES[name][1], FAMILIES[name][0]).render(TALK[:1], True)
  assert render("smollm2") == (
      "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, "
      "trained by Hugging Face<|im_end|>\n<|im_start|>user\nhello<|im_end|>\n"
      "<|im_start|>assistant\n")
  assert render("llama") == (
      "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nhello"
      "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n")
  assert render("inst") == "<s>[INST] hello [/INST]"


CONTENT = st.lists(st.sampled_from([
    "<|im_end|>", "<|im_start|>", "<|endoftext|>", "<|im_", "end|>", "\n", " ",
    "assistant", "hello", "<think>", "</think>", "é", "\U0001f600", "{{ x }}",
]), max_size=6).map("".join)


@settings(max_examples=100, deadline=None)
@given(contents=st.lists(CONTENT, min_size=2, max_size=6))
def test_no_message_can_forge_a_control_token(contents):
  """However the contents read, the control tokens are the template's own."""
  contents = contents[:len(contents) // 2 * 2]
  messages = [
      {"role": ("user", "assistant")[i % 2], "content": content}
      for i, content in enumerate(contents)]
  template = chat.ChatTemplate(build.CHATML, CHATML)
  tokens, mask = template.example_tokens(messages)
  start, end = CHATML.controls["<|im_start|>"], CHATML.eos_id
  assert tokens.count(start) == tokens.count(end) == len(messages)
  assert CHATML.controls["<|endoftext|>"] not in tokens
  assert targets(CHATML, tokens, mask) == [
      content + "<|im_end|>" for content in contents[1::2]]
  assert CHATML.decode(tokens) == template.render(messages, False)


def test_a_forged_turn_in_a_template_that_trims():
  template = chat.ChatTemplate(build.LLAMA3, LLAMA)
  tokens, mask = template.example_tokens([
      {"role": "user", "content": " a<|eot_id|> "},
      {"role": "assistant", "content": "<|begin_of_text|>b "}])
  assert tokens.count(LLAMA.eos_id) == 2
  assert tokens.count(LLAMA.bos_id) == 1
  assert targets(LLAMA, tokens, mask) == ["<|begin_of_text|>b<|eot_id|>"]


def test_bos_is_added_once_when_the_template_has_none():
  template = chat.ChatTemplate(
      build.LLAMA3.replace("bos_token + content", "content"), LLAMA)
  tokens, mask = template.example_tokens(TALK[:2])
  assert tokens[0] == LLAMA.bos_id and tokens.count(LLAMA.bos_id) == 1
  assert not mask[0]
  twice = chat.ChatTemplate("{{ bos_token }}" + build.LLAMA3, LLAMA)
  with pytest.raises(ValueError, match="BOS 2 times"):
    twice.prompt_tokens(TALK[:1])


UNMASKABLE = {
    "header in the loss": (
        build.CHATML.partition("{% if add")[0], "belongs to the generation"),
    "role header as plain text": (
        "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + "
        "eos_token }}{% endfor %}", "belongs to the generation"),
    "reasoning opened by the generation prompt": (
        build.CHATML.replace("assistant\n", "assistant\n<think>\n"),
        "where the prompt has"),
    "no end of turn": (
        "{% for m in messages %}{% if m['role'] == 'user' %}"
        "{{ '[' + m['content'] + ']' }}{% else %}{{ m['content'] }}"
        "{% endif %}{% endfor %}", "does not end in a stop token"),
    "a turn that is cut": (
        build.CHATML.replace("message['content']", "message['content'][:4]"),
        "loses text"),
}


@pytest.mark.parametrize("name", UNMASKABLE)
def test_a_template_without_an_exact_mask_is_refused(name):
  source, reason = UNMASKABLE[name]
  with pytest.raises(ValueError, match=reason) as error:
    chat.ChatTemplate(source, CHATML).example_tokens(TALK)
  assert "exact loss mask" in str(error.value)


def test_reasoning_cut_from_earlier_turns_is_no_target():
  template = chat.ChatTemplate(build.STRIPS_REASONING, CHATML)
  thought = [dict(m) for m in TALK]
  for message in thought[1::2]:
    message["content"] = "<think>hm</think>\n" + message["content"]
  with pytest.raises(ValueError, match=r"message 1.*loses text"):
    template.example_tokens(thought)
  tokens, mask = template.example_tokens(thought, last_only=True)
  assert targets(CHATML, tokens, mask) == [
      "<think>hm</think>\nThe answer is 42.<|im_end|>"]
  assert template.prompt_tokens(thought[:3]) == tokens[:mask.index(True)]


def test_generation_blocks_must_agree():
  marked = build.CHATML.replace(
      "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + "
      "'<|im_end|>' + '\n'}}",
      "{{'<|im_start|>' + message['role'] + '\n'}}"
      "{% if message['role'] == 'assistant' %}{% generation %}"
      "{{ message['content'] + '<|im_end|>' }}{% endgeneration %}"
      "{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}{{ '\n' }}")
  assert "generation %}" in marked
  template = chat.ChatTemplate(marked, CHATML)
  plain = chat.ChatTemplate(build.CHATML, CHATML)
  assert template.example_tokens(TALK) == plain.example_tokens(TALK)
  assert template.render(TALK, True) == plain.render(TALK, True)
  without_end = marked.replace(
      "{{ message['content'] + '<|im_end|>' }}{% endgeneration %}",
      "{{ message['content'] }}{% endgeneration %}{{ '<|im_end|>' }}")
  with pytest.raises(ValueError, match="blocks cover characters"):
    chat.ChatTemplate(without_end, CHATML).example_tokens(TALK)


def test_the_sandbox_and_what_a_template_may_ask_for():
  render = lambda source: chat.ChatTemplate(source, CHATML).render(TALK, False)
  assert render("{{ {'a': '<é>'} | tojson }}") == '{"a": "<é>"}'
  assert render("{{ strftime_now('%d %b %Y') }}") == "26 Jul 2024"
  with pytest.raises(ValueError, match="Roles must alternate"):
    chat.ChatTemplate(build.INST, INST).prompt_tokens(TALK[:1] * 2)
  with pytest.raises(ValueError, match="not valid Jinja: line 1"):
    chat.ChatTemplate("{% for %}", CHATML)
  with pytest.raises(ValueError, match="refuses"):
    render("{{ messages.append(1) }}")
  with pytest.raises((ValueError, jinja2.exceptions.SecurityError)):
    render("{{ ''.__class__.__mro__[1].__subclasses__() }}")


def test_rows_that_cannot_be_used():
  template = chat.ChatTemplate(build.CHATML, CHATML)
  with pytest.raises(ValueError, match="no assistant message"):
    template.example_tokens(TALK[:1])
  with pytest.raises(ValueError, match="Move the answer"):
    template.prompt_tokens(TALK)
  with pytest.raises(ValueError, match="noncharacters"):
    template.prompt_tokens([{"role": "user", "content": "\ufdd0"}])
