"""Oracles: transcripts written by hand, and the mask read back as text."""

import jinja2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from posttrain.text import chat, thinking
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


THINK = thinking.Thinking(start="<think>", end="</think>")
# Like R1's distilled models': the generation prompt opens the thinking, and
# the reasoning is cut out of earlier turns.
R1 = build.STRIPS_REASONING.replace("assistant\n'", "assistant\n<think>\n'")
# The end of the last message is the end of the prompt.
BARE = ("{% for m in messages %}{{ m['content'] }}"
        "{% if m['role'] == 'assistant' %}{{ eos_token }}{% endif %}"
        "{% endfor %}")


def user(content):
  return {"role": "user", "content": content}


def assistant(content):
  return {"role": "assistant", "content": content}


def opens(tokenizer, tokens):
  """As the engine finds it out, and as the text says."""
  found = thinking.opens(tokens, thinking.resolve(THINK, tokenizer))
  assert found == tokenizer.decode(tokens).rstrip().endswith("<think>")
  return found


@pytest.mark.parametrize("tail", ["<think>", "<think>\n", "<think> \n "])
@pytest.mark.parametrize("merges", [False, True])
def test_no_message_opens_the_thinking(tail, merges):
  """Templates with a generation prompt, with none, and with white space."""
  tokenizer = build.merging() if merges else CHATML
  make = lambda source, strings=THINK: chat.ChatTemplate(
      source, tokenizer, strings=strings)
  said = [user(f"6? {tail}")]
  for source in (build.CHATML, build.SMOLLM2, build.STRIPS_REASONING):
    assert not opens(tokenizer, make(source).prompt_tokens(said))
  for source in (BARE, BARE + "{{ '\n' }}"):
    with pytest.raises(ValueError, match="would open the thinking"):
      make(source).prompt_tokens(said)
    for fine in ([user("6? <think>."), assistant("5"), user("<think> 6?")],
                 [user("6? <think> and 6"), assistant("5"), user("6 < 7?")]):
      assert not opens(tokenizer, make(source).prompt_tokens(fine))
    # Without thinking nothing opens it.
    make(source, thinking.Thinking(
        start="<think>", end="")).prompt_tokens(said)


@pytest.mark.parametrize("content", [
    "6?", "6? <think>", "<think>\n", "like so: <think>\nhm\n6?"])
@pytest.mark.parametrize("merges", [False, True])
def test_a_generation_prompt_opens_the_thinking(content, merges):
  """Whatever the message says."""
  tokenizer = build.merging() if merges else CHATML
  template = chat.ChatTemplate(R1, tokenizer, strings=THINK)
  tokens = template.prompt_tokens([
      user("an example"), assistant("<think>\nhm</think>5"), user(content)])
  assert opens(tokenizer, tokens)
  plain = chat.ChatTemplate(R1, tokenizer).prompt_tokens([
      user("an example"), assistant("5"), user(content)])
  assert tokens == plain


def conversation(template, tokenizer, completions, texts=None):
  """Asks turn after turn; returns prompts, and the messages at the end.

  Args:
    completions: the sampled ids of each turn.
    texts: contents of the assistant's messages; by default what they spell.
  """
  messages, sampled, prompts = [], {}, []
  for turn, ids in enumerate(completions):
    messages.append(user(f"question {turn} <think>."))
    prompts.append(template.prompt_tokens(messages, sampled))
    # An end of turn is no part of the text.
    text = tokenizer.decode([i for i in ids if i not in tokenizer.stop_ids])
    sampled[len(messages)] = ids
    messages.append(assistant(texts[turn] if texts else text))
  return prompts, messages


def odd(tokenizer, text):
  """Spells a text in bytes, as no encoder would."""
  ids = [i for char in text for i in tokenizer.encode(char)]
  assert ids != tokenizer.encode(text) and tokenizer.decode(ids) == text
  return ids


@pytest.mark.parametrize("ended", [True, False])
@pytest.mark.parametrize("name", ["chatml", "smollm2", "llama", "merging"])
def test_a_prompt_begins_with_the_turn_before(name, ended):
  """With the ids that were sampled, whatever the text alone would give.

  A turn that a length cut off has no end; the template adds it.
  """
  tokenizer, source = (build.merging(), build.CHATML) if (
      name == "merging") else FAMILIES[name][:2]
  template = chat.ChatTemplate(source, tokenizer, strings=THINK)
  stop = [tokenizer.eos_id] * ended
  completions = [[*odd(tokenizer, text), *stop] for text in (
      "<think>hm.</think>\nhello", "and so it is.", "The answer is 42.")]
  prompts, messages = conversation(template, tokenizer, completions)
  for before, ids, later in zip(
      prompts, completions, prompts[1:], strict=False):
    begin = [*before, *ids]
    assert later[:len(begin)] == begin
    assert later[len(begin) - ended] == tokenizer.eos_id
  for k, prompt in enumerate(prompts):
    text = template.render(messages[:2 * k + 1], True)
    assert tokenizer.decode(prompt) == text
  plain, _ = conversation(
      chat.ChatTemplate(source, tokenizer), tokenizer, completions)
  assert plain == prompts


def test_a_control_token_that_was_sampled_stays_one():
  """Its text is the same as if the message had typed it."""
  strings = thinking.Thinking(
      start="<|im_start|>think", end="<|im_start|>answer")
  template = chat.ChatTemplate(build.CHATML, CHATML, strings=strings)
  control = CHATML.controls["<|im_start|>"]
  ids = [control, *CHATML.encode("user\n"), control, *odd(CHATML, "think"),
         CHATML.eos_id]
  prompts, messages = conversation(template, CHATML, [ids, []])
  assert prompts[1][:len(prompts[0]) + len(ids)] == [*prompts[0], *ids]
  # Without the ids only the string of the config is a control token.
  text = template.prompt_tokens(messages[:3])
  assert text[len(prompts[0]):][:len(ids) + 99].count(control) == 3


@pytest.mark.parametrize("source", [build.STRIPS_REASONING, R1])
def test_a_history_without_its_reasoning_is_encoded_as_text(source):
  template = chat.ChatTemplate(source, CHATML, strings=THINK)
  ids = [*odd(CHATML, "<think>\nhm</think>\nhello"), CHATML.eos_id]
  prompts, messages = conversation(template, CHATML, [ids, ids, []])
  for k, prompt in enumerate(prompts):
    assert prompt == template.prompt_tokens(messages[:2 * k + 1])
  assert "hm" not in CHATML.decode(prompts[-1])


@pytest.mark.parametrize("ids", [
    [], CHATML.encode("other"), [*CHATML.encode("hello"), 0],
    [*CHATML.encode("hello"), CHATML.eos_id, CHATML.eos_id],
    CHATML.encode("hello there"), CHATML.encode("hell")])
def test_ids_that_spell_something_else_are_not_used(ids):
  """0 is a stop token, and not the one with which this template ends turns."""
  template = chat.ChatTemplate(build.CHATML, CHATML, strings=THINK)
  messages = [user("a"), assistant("hello"), user("b")]
  assert CHATML.controls["<|endoftext|>"] == 0
  assert template.prompt_tokens(
      messages, {1: ids}) == template.prompt_tokens(messages)


def test_a_typed_end_of_turn_needs_its_own():
  template = chat.ChatTemplate(build.CHATML, CHATML, strings=THINK)
  messages = [user("a"), assistant("hello<|im_end|>"), user("b")]
  for ids in (CHATML.encode("hello"), [*CHATML.encode("hello"), CHATML.eos_id]):
    tokens = template.prompt_tokens(messages, {1: ids})
    assert tokens == template.prompt_tokens(messages)
    assert tokens.count(CHATML.eos_id) == 3
