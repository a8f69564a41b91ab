"""Oracles: tokens and masks put together by hand."""

import re

import numpy as np
import pytest

from posttrain.text import chat, render
from tests.text import build

WORDS, CHATML, INST = build.words(), build.chatml(), build.inst()
ROW = {"prompt": "6 5 : 1 <think>", "completion": "6 - 5 </think> 1"}


def test_plain_is_prompt_completion_and_eos():
  tokens, mask = render.make_renderer(WORDS, "plain").example_tokens(ROW)
  prompt, completion = WORDS.encode(ROW["prompt"]), WORDS.encode(
      ROW["completion"])
  assert tokens.tolist() == [*prompt, *completion, WORDS.eos_id]
  assert mask.tolist() == [False] * len(prompt) + [True] * (
      len(completion) + 1)
  assert tokens.dtype == np.int32 and mask.dtype == bool


def test_plain_has_one_bos_where_the_family_has_one():
  renderer = render.make_renderer(INST, "plain")
  prompt = renderer.prompt_tokens({"prompt": "<s>hello</s>"})
  assert prompt[0] == INST.bos_id and prompt.count(INST.bos_id) == 1
  tokens, mask = renderer.example_tokens({"prompt": "", "completion": "hi</s>"})
  assert not mask[0] and mask[1:].all()
  assert tokens.tolist().count(INST.eos_id) == 1


def test_every_form_of_a_row_gives_the_same_tokens():
  renderer = render.make_renderer(CHATML)
  user = {"role": "user", "content": "hello"}
  answer = {"role": "assistant", "content": "world"}
  forms = [
      {"prompt": "hello", "completion": "world"},
      {"prompt": [user], "completion": [answer]},
      {"prompt": np.array([{**user, "name": None}]), "completion": "world"},
      {"messages": [user], "completion": "world"},
      {"messages": [user, answer]}]
  first = renderer.example_tokens(forms[0])
  for form in forms[1:]:
    for a, b in zip(first, renderer.example_tokens(form), strict=True):
      np.testing.assert_array_equal(a, b)
  prompt = renderer.prompt_tokens({"prompt": "hello"})
  assert first[0][:len(prompt)].tolist() == prompt
  assert renderer.prompt_tokens(forms[1]) == prompt


def test_parts_of_text_are_one_text():
  renderer = render.make_renderer(CHATML)
  parts = lambda *texts: [{"type": "text", "text": t} for t in texts]
  say = lambda role, content: {"role": role, "content": content}
  whole = renderer.example_tokens({"messages": [
      say("user", "hello how"), say("assistant", "are you")]})
  for cut in (parts("hello ", "how"), tuple(parts("", "hello how")),
              np.array([{**part, "image": None} for part in parts(
                  "hello", " how")])):
    row = {"messages": [say("user", cut), say("assistant", parts("are you"))]}
    for a, b in zip(whole, renderer.example_tokens(row), strict=True):
      np.testing.assert_array_equal(a, b)
  assert renderer.prompt_tokens(
      {"prompt": [say("user", parts("hello ", "how"))]}
  ) == renderer.prompt_tokens({"prompt": "hello how"})


IMAGE = {"type": "image_url", "image_url": {"url": "http://a"}}


@pytest.mark.parametrize("content, message", [
    (42, "message 0 has the content 42, a int; a text, or a list of parts"),
    (1.5, "the content 1.5, a float"), (True, "the content True, a bool"),
    ({"type": "text", "text": "a"}, "a dict; a text, or a list of parts"),
    (None, "message 0 has no content"), (b"a", "the content b'a', a bytes"),
    ([IMAGE], "message 0 has the part {'image_url'"),
    ([{"type": "text", "text": "a"}, IMAGE], "has the part"),
    ([{"type": "text", "text": 5}], "has the part"),
    ([{"type": "text"}], "has the part"), ([{"text": "a"}], "has the part"),
    (["a"], "has the part 'a'"), ([["a"]], "has the part"),
    ("a \ud800", "message 0 has '\\ud800' at character 2"),
])
@pytest.mark.parametrize("role", ["user", "assistant"])
def test_a_content_of_another_type_is_an_error(content, message, role):
  """In every role, as a prompt, and as a target."""
  renderer = render.make_renderer(CHATML)
  user, said = {"role": "user", "content": "hi"}, {
      "role": role, "content": content}
  rows = [{"messages": [said, user]}, {"prompt": [said, user]}]
  for row in rows:
    with pytest.raises(ValueError, match=re.escape(message)):
      renderer.prompt_tokens(row)
  with pytest.raises(ValueError, match=re.escape(message)):
    renderer.example_tokens({"prompt": "hi", "completion": [said]})


def test_a_message_without_a_content_is_an_error():
  """With calls of tools too, of which there are none yet."""
  renderer = render.make_renderer(CHATML)
  user = {"role": "user", "content": "hi"}
  for said in ({"role": "assistant"},
               {"role": "assistant", "content": None, "tool_calls": [{}]}):
    with pytest.raises(ValueError, match="message 1 has no content"):
      renderer.example_tokens({"messages": [user, said]})
  with pytest.raises(ValueError, match="message 1 has the reasoning 5"):
    renderer.example_tokens({"messages": [
        user, {"role": "assistant", "content": "a", "reasoning": 5}]})


@pytest.mark.parametrize("renderer", [
    render.make_renderer(WORDS, "plain"), render.make_renderer(CHATML)])
def test_half_of_a_surrogate_pair_is_an_error(renderer):
  """Tokenizers raise whatever they like of it: RuntimeError, TypeError."""
  for row in ({"prompt": "a \udcff", "completion": "b"},
              {"prompt": "a", "completion": "\udcff"}):
    with pytest.raises(ValueError, match=r"'\\udcff' at character"):
      renderer.example_tokens(row)
  with pytest.raises(ValueError, match=r"'\\udcff' at character 2"):
    renderer.prompt_tokens({"prompt": "a \udcff"})


def test_with_a_completion_only_the_completion_is_learnt():
  renderer = render.make_renderer(CHATML)
  turns = [{"role": "user", "content": "hello"},
           {"role": "assistant", "content": "how"}]
  row = {"messages": [*turns, turns[0]], "completion": "are"}
  tokens, mask = renderer.example_tokens(row)
  assert CHATML.decode(tokens[mask]) == "are<|im_end|>"
  tokens, mask = renderer.example_tokens({"messages": [
      *row["messages"], {"role": "assistant", "content": "are"}]})
  assert CHATML.decode(tokens[mask]) == "how<|im_end|>are<|im_end|>"


def test_the_hash_is_of_template_and_tokenizer(tmp_path):
  make = render.make_renderer
  (tmp_path / "same.jinja").write_text(build.CHATML)
  assert make(CHATML).hash == make(CHATML, str(tmp_path / "same.jinja")).hash
  other = chat.ChatTemplate(build.SMOLLM2, CHATML)
  hashes = {make(CHATML).hash, make(CHATML, "plain").hash,
            make(WORDS, "plain").hash, render.ChatRenderer(other, CHATML).hash}
  assert len(hashes) == 4


def test_errors_name_what_is_missing():
  plain = render.make_renderer(WORDS, "plain")
  chatty = render.make_renderer(CHATML)
  cases = [
      (lambda: render.make_renderer(WORDS), 'Set chat_template="plain"'),
      (lambda: render.make_renderer(WORDS, "x.jinja"), "does not exist"),
      (lambda: plain.prompt_tokens({"messages": []}),
       "messages and no `prompt`"),
      (lambda: plain.example_tokens({"prompt": "6"}), "no `completion`"),
      (lambda: plain.prompt_tokens({"prompt": 6}), "is a int"),
      (lambda: plain.example_tokens({"prompt": "", "completion": "6"}),
       "no BOS"),
      (lambda: chatty.prompt_tokens({"text": "a"}), "either `messages` or"),
      (lambda: chatty.prompt_tokens({"messages": "a"}), "a list is needed"),
      (lambda: chatty.prompt_tokens({"prompt": [{"from": "a"}]}),
       "needs `role`"),
  ]
  for call, message in cases:
    with pytest.raises(ValueError, match=message):
      call()
