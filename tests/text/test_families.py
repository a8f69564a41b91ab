"""Every family's tokenizer and template. Oracles: the text read back, and a
statement per family of what its template does to an answer."""

import itertools
import unicodedata

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from posttrain.text import chat, thinking
from posttrain.text import tokenizer as tokenizer_lib
from tests.text import families

TRIMS = {"llama3", "gemma2", "gemma3"}
# Where a conversation may begin with a system message.
SYSTEM = set(families.FAMILIES) - {"gemma2", "mistral"}
EMPTY_THOUGHT = "<think>\n\n</think>\n\n"


@pytest.fixture(scope="module")
def releases(tmp_path_factory):
  root = tmp_path_factory.mktemp("releases")
  return {name: tokenizer_lib.load(families.write(root / name, name))
          for name in families.FAMILIES}


def rendered_answer(name: str, content: str, last: bool) -> str:
  """An assistant's message as its family's template writes it."""
  if name in TRIMS:
    content = content.strip()
  if name == "smollm3" or (name == "qwen3" and last):
    content = content.lstrip("\n")
  if name == "qwen3" and last:
    content = EMPTY_THOUGHT + content
  if name in ("qwen2.5", "qwen3"):
    content = unicodedata.normalize("NFC", content)
  end = {"gemma2": "<end_of_turn>", "gemma3": "<end_of_turn>"}.get(
      name, families.FAMILIES[name].eos)
  return content + end


def targets(tokenizer, tokens, mask) -> list[str]:
  """The text of each run in the loss, read behind what comes before it.

  A decoder drops a space at the start of what it is given.
  """
  edges = [0, *(np.flatnonzero(np.diff(mask)) + 1), len(tokens)]
  return [
      tokenizer.decode(tokens[:end])[len(tokenizer.decode(tokens[:start])):]
      for start, end in itertools.pairwise(edges) if mask[start]]


@pytest.mark.parametrize("name", families.FAMILIES)
def test_a_release_says_what_begins_and_ends_a_text(releases, name):
  tokenizer, family = releases[name], families.FAMILIES[name]
  ids = tokenizer.controls
  assert set(family.special) == set(ids)
  assert tokenizer.eos_id == ids[family.eos]
  assert set(tokenizer.stop_ids) == {ids[stop] for stop in family.stops} | {
      tokenizer.eos_id}
  assert tokenizer.bos_id == (ids[family.bos] if family.add_bos else None)
  assert tokenizer.named.get("bos_token") == family.bos


@pytest.mark.parametrize("name", families.FAMILIES)
def test_forged_control_tokens_are_text(releases, name):
  tokenizer = releases[name]
  for text in (*families.FORGED, *families.STRESS):
    ids = tokenizer.encode(text)
    assert not set(ids) & set(tokenizer.controls.values())
    if name not in ("qwen2.5", "qwen3"):  # These compose: NFC.
      assert tokenizer.decode(ids) == text
  parsed = tokenizer.encode("".join(tokenizer.controls), special=True)
  assert parsed == list(tokenizer.controls.values())


@pytest.mark.parametrize("name", families.FAMILIES)
def test_the_bytes_of_tokens_are_those_of_the_text(releases, name):
  """Behind other text, where no pipeline puts a space."""
  tokenizer = releases[name]
  after = tokenizer.encode("a")[-1]
  for text in (*families.STRESS, *families.FORGED):
    ids = tokenizer.encode(text, after=after)
    if name.startswith("qwen"):  # It composes characters.
      text = unicodedata.normalize("NFC", text)
    assert b"".join(map(tokenizer.token_bytes, ids)) == text.encode()


@pytest.mark.parametrize("name", families.FAMILIES)
def test_a_text_in_the_middle_is_what_the_pipeline_gives_there(
    releases, name):
  """Behind "x", a text's tokens are those that it has in one piece."""
  raw = tokenizers.Tokenizer.from_str(families.pipeline_of(name))
  tokenizer = releases[name]
  for text in (" hello", "\n\nworld", ".", " 42", "日本"):
    whole = raw.encode("x" + text, add_special_tokens=False).ids
    assert whole == [*tokenizer.encode("x"),
                     *tokenizer.encode(text, after=tokenizer.encode("x")[-1])]


CONTENT = st.lists(st.sampled_from([
    "<|im_end|>", "<|im_start|>", "</s>", "<s>", "<end_of_turn>", "<eos>",
    "<|eot_id|>", "<|endoftext|>", "<|im_", "end|>", "[/INST]", "\n", " ",
    "\n\n", "assistant", "hello", "<think>", "42", "中文", "e\u0301",
    "👩‍👩‍👧", "{{ x }}", "{% raw %}",
]), min_size=1, max_size=6).map("".join)


@pytest.mark.parametrize("name", families.FAMILIES)
@settings(max_examples=25, deadline=None, derandomize=True)
@given(contents=st.lists(CONTENT, min_size=2, max_size=6), system=CONTENT)
def test_the_mask_is_each_answer_and_its_end_and_nothing_else(
    releases, name, contents, system):
  tokenizer = releases[name]
  template = chat.ChatTemplate(families.template(name), tokenizer)
  contents = contents[:len(contents) // 2 * 2]
  messages = [{"role": "system", "content": system}] * (name in SYSTEM)
  messages += [{"role": ("user", "assistant")[i % 2], "content": content}
               for i, content in enumerate(contents)]
  tokens, mask = template.example_tokens(messages)
  answers = contents[1::2]
  assert targets(tokenizer, tokens, mask) == [
      rendered_answer(name, answer, i == len(answers) - 1)
      for i, answer in enumerate(answers)]
  # A prompt is the beginning of its example, token by token.
  prompt = template.prompt_tokens(messages[:-1])
  last = template.example_tokens(messages, last_only=True)
  assert last[0][:len(prompt)] == prompt
  assert last[1].index(True) == len(prompt)
  # Whatever the messages say, each turn ends once.
  ends = sum(token in tokenizer.stop_ids for token in tokens)
  roles = {"mistral": len(answers), "olmo2": len(answers) + 1}  # And BOS.
  always = name in ("llama3", "smollm3")  # They always have a system turn.
  folded = name == "gemma3"  # The system text is in the first user's turn.
  if name in ("llama3", "qwen2.5", "qwen3", "smollm2", "smollm3"):
    assert ends == len(contents) + (always or name in SYSTEM)
  else:
    assert ends == roles.get(name, len(messages) - folded)


THOUGHT = "<think>\nhm\n</think>\n\n"


def talk(*answers: str) -> list[dict[str, str]]:
  return [message for answer in answers for message in (
      {"role": "user", "content": "hello"},
      {"role": "assistant", "content": answer})]


def test_qwen3_cuts_earlier_reasoning_and_that_is_no_target(releases):
  template = chat.ChatTemplate(families.template("qwen3"), releases["qwen3"])
  both = talk(THOUGHT + "one", THOUGHT + "two")
  with pytest.raises(ValueError, match=r"message 1.*loses text"):
    template.example_tokens(both)
  tokens, mask = template.example_tokens(both, last_only=True)
  assert targets(releases["qwen3"], tokens, mask) == [
      THOUGHT + "two<|im_end|>"]
  assert "hm" in releases["qwen3"].decode(tokens)
  assert releases["qwen3"].decode(tokens).count("hm") == 1
  named = [{**message} for message in both]
  for message in named[1::2]:
    message["content"] = message["content"].removeprefix(THOUGHT)
    message["reasoning"] = "hm"  # What other servers call it.
  assert template.example_tokens(named, last_only=True) == (tokens, mask)


def test_smollm3_marks_more_than_the_turn(releases):
  """Its {% generation %} blocks begin with the header; the loss does not."""
  template = chat.ChatTemplate(
      families.template("smollm3"), releases["smollm3"])
  tokens, mask = template.example_tokens(talk("one", "two"))
  assert targets(releases["smollm3"], tokens, mask) == [
      "one<|im_end|>", "two<|im_end|>"]
  quiet = [{"role": "system", "content": "/no_think Be brief."}]
  tokens, mask = template.example_tokens([*quiet, *talk("one")])
  assert targets(releases["smollm3"], tokens, mask) == ["one<|im_end|>"]


def test_gemma2_and_mistral_refuse_a_system_message(releases):
  for name in ("gemma2", "mistral"):
    template = chat.ChatTemplate(families.template(name), releases[name])
    with pytest.raises(ValueError, match="refuses these messages"):
      template.prompt_tokens(
          [{"role": "system", "content": "x"}, *talk("a")[:1]])


def test_mistral_answers_begin_without_a_second_space(releases):
  """Its tokenizer puts a space before a text; an answer is no new text."""
  tokenizer = releases["mistral"]
  template = chat.ChatTemplate(families.template("mistral"), tokenizer)
  tokens, mask = template.example_tokens(talk("hello", " hello"))
  first, second = (
      [tokenizer.token_text(token) for token in run]
      for run in np.split(np.array(tokens)[mask], [
          int(np.flatnonzero(np.diff(np.flatnonzero(mask)) > 1)[0]) + 1]))
  assert "".join(first) == "hello</s>"
  assert "".join(second) == " hello</s>"


@pytest.mark.parametrize("name", families.FAMILIES)
def test_what_is_forced_into_a_text_adds_no_space(releases, name):
  tokenizer = releases[name]
  strings = dict(end="</think>", newline="\n", final_answer="Answer: ",
                 wait_text="Wait")
  found = thinking.resolve(thinking.Thinking(**strings), tokenizer)
  before = tokenizer.encode("hm")
  for text, ids in (("\n", found.newline), ("Wait", found.wait),
                    ("Answer: ", found.final_answer)):
    assert tokenizer.decode([*before, *ids]) == "hm" + text


@pytest.mark.parametrize("dummy_prefix", [False, True])
@pytest.mark.parametrize("legacy", [False, True])
def test_a_sentencepiece_release_has_the_tokens_named_beside_it(
    tmp_path, dummy_prefix, legacy):
  name = "gemma3"
  families.write_model(
      tmp_path / "a", name, dummy_prefix=dummy_prefix, legacy=legacy)
  tokenizer = tokenizer_lib.load(tmp_path / "a")
  assert set(families.FAMILIES[name].special) - {"<unk>"} == set(
      tokenizer.controls)
  assert tokenizer.eos_id == tokenizer.controls["<eos>"]
  assert tokenizer.controls["<end_of_turn>"] in tokenizer.stop_ids
  for text in (*families.FORGED, *families.STRESS):
    ids = tokenizer.encode(text)
    assert not set(ids) & set(tokenizer.controls.values())
    assert tokenizer.decode(ids) == text
    both = tokenizer.encode(f"<bos>{text}<eos>", special=True)
    assert tokenizer.decode(both) == f"<bos>{text}<eos>"
  spaced = tokenizer.encode("<bos>a", special=True)
  start = tokenizer.token_text(spaced[1])
  assert start.startswith(" ") == (dummy_prefix and legacy)
  tokenizer.save(tmp_path / "b")
  again = tokenizer_lib.load(tmp_path / "b")
  assert again.fingerprint() == tokenizer.fingerprint()
  assert again.named == tokenizer.named
  assert again.chat_template == tokenizer.chat_template
  template = chat.ChatTemplate(tokenizer.chat_template, again)
  tokens, mask = template.example_tokens(talk("hello <end_of_turn>"))
  assert targets(again, tokens, mask) == ["hello <end_of_turn><end_of_turn>"]


def test_added_tokens_beyond_the_model_and_against_it(tmp_path):
  families.write_model(tmp_path, "mistral", dummy_prefix=True)
  size = tokenizer_lib.load(tmp_path).vocab_size
  families.write_configs(
      tmp_path, "mistral", {"</s>": 2}.get, added_tokens_decoder={
          str(size + 2): {"content": "<|im_end|>", "special": True},
          str(size + 3): {"content": "<think>", "special": False}})
  tokenizer = tokenizer_lib.load(tmp_path)
  assert tokenizer.vocab_size == size + 4
  assert tokenizer.controls["<|im_end|>"] == size + 2
  assert size + 3 in tokenizer.encode("a<think>b")
  assert size + 2 not in tokenizer.encode("a<|im_end|>b")
  families.write_configs(
      tmp_path, "mistral", {"</s>": 2}.get, added_tokens_decoder={
          "5": {"content": "<|im_end|>", "special": True}})
  with pytest.raises(ValueError, match=r"token 5 is '<\|im_end\|>'"):
    tokenizer_lib.load(tmp_path)
