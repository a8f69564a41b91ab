"""Oracles: tokens and masks put together by hand."""

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
