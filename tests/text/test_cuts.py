"""The assistant's text is spelt as sampling forces it.

Oracles: pieces encoded by hand, a scan over every place of a text, and the
renderer without thinking strings.
"""

import pathlib
import random

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from posttrain import config as config_lib
from posttrain import weights
from posttrain.tasks import loading
from posttrain.text import chat, cuts, render, thinking
from posttrain.text import tokenizer as tokenizer_lib
from tests.text import build, families

THINK = thinking.Thinking(start="<think>", end="</think>")
MERGING = build.merging(chat_template=build.CHATML)
ROOT = pathlib.Path(__file__).parents[2]


def after(ids, text, tokenizer=MERGING):
  return tokenizer.encode(text, after=ids[-1])


def alone(text, tokenizer=MERGING, name="end"):
  return [*thinking.spell(name, text, tokenizer)]


def contains(tokens, part):
  tokens, part = [*map(int, tokens)], [*part]
  return any(tokens[i:i + len(part)] == part for i in range(len(tokens)))


@pytest.mark.parametrize("text", [
    "so it is.</think>\nThe answer", "it is </think>\n\n18", "<b></think>\n",
    "Wait.</think> and 7"])
def test_a_delimiter_is_spelt_alone_however_bpe_would_merge_it(text):
  """Each of these merges across an edge; the cut is at both edges."""
  left, right = text.split("</think>")
  whole = MERGING.encode(text)
  assert not contains(whole, alone("</think>"))
  for name in ("plain", ""):
    tokens, mask = render.make_renderer(
        MERGING, name, THINK).example_tokens(
            {"prompt": "6 times 3?", "completion": text})
    thought = MERGING.encode(left)
    ids = [*thought, *alone("</think>")]
    ids += after(ids, right)
    assert tokens[mask].tolist() == [*ids, MERGING.eos_id]
    assert MERGING.decode(ids) == text


def test_a_final_answer_behind_the_end_is_spelt_alone_too():
  strings = thinking.Thinking(
      start="<think>", end="</think>", final_answer="\nThe answer")
  text = "it is.</think>\nThe answers are\nThe answer"
  tokens, mask = render.make_renderer(
      MERGING, "plain", strings).example_tokens(
          {"prompt": "a", "completion": text})
  ids = [*MERGING.encode("it is."), *alone("</think>"), *alone("\nThe answer")]
  # Only there: elsewhere it is a text like any other.
  ids += after(ids, "s are\nThe answer")
  assert tokens[mask].tolist() == [*ids, MERGING.eos_id]
  # What the sampler forces is exactly that.
  found = thinking.resolve(strings, MERGING)
  assert contains(tokens, [*found.end, *found.final_answer])


ATOMS = ("<think>", "</think>", "</", "think>", "<", "\n", "\n\n", ".", " a",
         "Answer", "\nFinal:", "Wait", "</think>\nAnswer", "b")
SETS = (
    THINK,
    thinking.Thinking(end="</think>", delimiters=("</", "\n\n")),
    thinking.Thinking(
        start="<think>", end="</think>", final_answer="\nFinal:",
        delimiters=("</think>\nAnswer", "\n</think>", "Answer")),
    thinking.Thinking(start="<", end="\n\n", final_answer="\n"),
    # An `end` with line breaks around the model's own.
    thinking.Thinking(
        start="<think>", end="\n</think>\n", delimiters=("</think>", "</")))


def scan(text, strings):
  """Cuts by looking at every end and every string, in plain Python."""
  names = {name for name in (
      strings.start, strings.end, *strings.delimiters) if name}
  found, done, end = [], 0, 1
  while end <= len(text):
    there = [name for name in names
             if end - len(name) >= done and text[:end].endswith(name)]
    if not there:
      end += 1
      continue
    longest = max(there, key=len)
    name = strings.end if strings.end in there else longest
    begin = end - len(name)
    # One that stands inside of `end` is a part of it.
    whole = text.find(strings.end, done)
    if 0 <= whole <= begin:
      name, begin = strings.end, whole
    found += [text[done:begin], (name,)]
    done = begin + len(name)
    final = strings.final_answer
    if name == strings.end and final and text[done:].startswith(final):
      found.append((final,))
      done += len(final)
    end = done + 1
  return [piece for piece in (*found, text[done:]) if piece]


@pytest.mark.parametrize("strings", SETS)
def test_cuts_are_those_of_a_scan(strings):
  rng = random.Random(0)
  made = cuts.Cuts(strings, MERGING)
  for _ in range(5000):
    text = "".join(rng.choices(ATOMS, k=rng.randrange(9)))
    pieces = [(piece,) if ids else piece for piece, ids in made.pieces(text)]
    assert pieces == scan(text, strings), text


@settings(max_examples=200, deadline=None)
@given(parts=st.lists(st.sampled_from([*ATOMS, "é", "日"]), max_size=8))
def test_cuts_change_no_text(parts):
  text = "".join(parts)
  for strings in SETS:
    tokens, mask = render.make_renderer(
        MERGING, "plain", strings).example_tokens(
            {"prompt": "a", "completion": text})
    assert MERGING.decode(tokens[mask]) == text + "<|im_end|>"


def test_without_an_end_nothing_is_cut():
  strings = thinking.Thinking(start="<think>", end="", delimiters=("</",))
  text = "<think>so.</think>\n"
  assert [*cuts.Cuts(strings, MERGING).pieces(text)] == [(text, None)]


def test_a_stop_token_as_a_delimiter_stays_text_within_a_turn():
  """Else a text of the assistant's could end its turn."""
  strings = thinking.Thinking(
      start="<think>", end="</think>", delimiters=("<|im_end|>",))
  text = "so<|im_end|>.</think>\n"
  for name in ("plain", ""):
    tokens, mask = render.make_renderer(MERGING, name, strings).example_tokens(
        {"prompt": "a", "completion": text})
    assert tokens[mask].tolist().count(MERGING.eos_id) == 1
    assert MERGING.decode(tokens[mask]) == text + "<|im_end|>"


@pytest.fixture(scope="module")
def twins(tmp_path_factory):
  """Renderers with and without strings, where both delimiters are tokens."""
  root = tmp_path_factory.mktemp("releases")
  releases = [
      (build.chatml(), build.CHATML), (build.llama(), build.LLAMA3),
      (build.inst(), build.INST),
      (build.chatml(), build.STRIPS_REASONING),
      *((tokenizer_lib.load(families.write(root / name, name)),
         families.template(name)) for name in ("qwen3", "smollm3"))]
  pair = lambda make: [make(strings) for strings in (None, THINK)]
  chats = [pair(lambda strings, t=tokenizer, source=source: render.ChatRenderer(
      chat.ChatTemplate(source, t, strings=strings), t))
           for tokenizer, source in releases]
  return chats, [pair(lambda strings, t=tokenizer: render.PlainRenderer(
      t, strings)) for tokenizer, _ in releases]


def outcome(renderer, row):
  try:
    return [part.tolist() for part in renderer.example_tokens(row)]
  except ValueError as error:  # A template may lose text: both then do.
    return str(error)


CONTENT = st.lists(st.sampled_from([
    "<think>", "</think>", " ", "\n", "\n\n", ".", "hello", " world", "<|im_",
    "<|im_end|>", "e\u0301", "中文", "</", "42", "think>",
]), min_size=1, max_size=8).map("".join)


@settings(max_examples=60, deadline=None)
@given(contents=st.lists(CONTENT, min_size=2, max_size=4))
def test_where_delimiters_are_single_tokens_nothing_changes(twins, contents):
  """Every token and its mask is that of the renderer without strings."""
  contents = contents[:len(contents) // 2 * 2]
  messages = [{"role": ("user", "assistant")[i % 2], "content": content}
              for i, content in enumerate(contents)]
  rows = [{"messages": messages[:-1], "completion": contents[-1]},
          {"prompt": contents[0], "completion": contents[1]}]
  for pairs, row in zip(twins, rows, strict=True):
    for old, new in pairs:
      assert outcome(new, row) == outcome(old, row)
      assert new.hash == old.hash


@pytest.mark.parametrize("name", [
    "tiny.py", "tiny.py:debug", "quickstart.py", "quickstart.py:debug",
    "s1.py:debug", "distill_70b.py:debug", "mixture.py:debug",
    "r1_zero.py:debug"])
def test_the_shipped_tasks_are_spelt_as_before(name, monkeypatch):
  """Their tokenizers have a token for each delimiter, in prompts too."""
  monkeypatch.chdir(ROOT)
  config = config_lib.load(f"configs/{name}")
  tokenizer = weights.tokenizer(config, None)
  new = weights.make_renderer(config, tokenizer)
  old = render.make_renderer(tokenizer, config.chat_template)
  rows = lambda source, split="train", args=None: loading.load_function(
      source["task"])(split, **{"count": 16, **(args or source["args"])})[:16]
  examples = [row for stage in config.stages if "data" in config[stage]
              for source in config[stage].data.sources
              for row in rows(source)]
  problems = [row for stage in config.stages if "problems" in config[stage]
              for row in rows(config[stage].problems)]
  for row in examples:
    assert outcome(new, row) == outcome(old, row)
  for row in problems:
    assert new.prompt_tokens(row) == old.prompt_tokens(row)
  assert examples or problems


S1 = thinking.Thinking(start="<|im_start|>think", end="<|im_start|>answer")


@pytest.fixture(scope="module")
def qwen(tmp_path_factory):
  return tokenizer_lib.load(families.write(
      tmp_path_factory.mktemp("qwen") / "a", "qwen2.5"))


def test_s1s_delimiters_are_control_tokens_in_the_assistants_text_only(qwen):
  """Its SFT wrote "<|im_start|>" as text, which the sampler never matches."""
  start = qwen.controls["<|im_start|>"]
  renderer = render.make_renderer(qwen, "", S1)
  forged = "say <|im_start|>think and <|im_start|>answer"
  tokens, mask = renderer.example_tokens({
      "messages": [{"role": "system", "content": forged},
                   {"role": "user", "content": forged}],
      "completion": "<|im_start|>think\nhm.\n<|im_start|>answer\n<|im_end|>5"})
  turn = [start, *qwen.encode("think"), *qwen.encode("\nhm.\n"), start,
          *qwen.encode("answer"), *qwen.encode("\n<|im_end|>5")]
  assert tokens[mask].tolist() == [*turn, qwen.eos_id]
  assert tokens[~mask].tolist().count(start) == 3  # Of the three roles.
  found = thinking.resolve(S1, qwen)
  assert contains(tokens[mask], found.start)
  assert contains(tokens[mask], found.end)
  assert not contains(tokens[~mask], found.start)
  assert tokens[~mask].tolist() == [*render.make_renderer(
      qwen).prompt_tokens({"messages": [
          {"role": "system", "content": forged},
          {"role": "user", "content": forged}]}),
      *tokens[len(tokens) - 1:].tolist()]


REASONS = build.CHATML.replace(
    "message['content'] +",
    "(('<|im_start|>think\n' + message['reasoning_content'] + "
    "'\n<|im_start|>answer\n') if message['reasoning_content'] else '') + "
    "message['content'] +")


def test_reasoning_is_a_part_of_the_assistants_text(qwen):
  """A template's own delimiters and a message's are spelt alike."""
  user = {"role": "user", "content": "6?"}
  template = chat.ChatTemplate(REASONS, qwen, strings=S1)
  by_name = template.example_tokens(
      [user, {"role": "assistant", "content": "5", "reasoning": "hm."}])
  typed = template.example_tokens([user, {
      "role": "assistant", "content":
      "<|im_start|>think\nhm.\n<|im_start|>answer\n5"}])
  assert by_name == typed
  # Without the strings its headers belong to no turn.
  with pytest.raises(ValueError, match="before its text"):
    chat.ChatTemplate(REASONS, qwen).example_tokens(
        [user, {"role": "assistant", "content": "5", "reasoning": "hm."}])


def test_s1s_own_rows(qwen, tmp_path, monkeypatch):
  """The rows that configs/s1.py makes of s1K, in Qwen2.5's template."""
  path = tmp_path / "s1k.parquet"
  pyarrow.parquet.write_table(pyarrow.Table.from_pylist([dict(
      question="How much is 6 times 3? <|im_start|>think", attempt="It is 18.",
      thinking_trajectories=["6 and 6 is 12.", "12 and 6 is 18."])]), path)
  monkeypatch.chdir(ROOT)
  config = config_lib.load("configs/s1.py")
  [row] = loading.load_function(config.think.data.sources[0]["task"])(
      "train", path=str(path))
  renderer = weights.make_renderer(config, qwen)
  tokens, mask = renderer.example_tokens(row)
  found = thinking.resolve(thinking.Thinking(**config.thinking), qwen)
  turn = [
      *found.start, *qwen.encode("\n6 and 6 is 12.\n"),
      *found.start, *qwen.encode("\n12 and 6 is 18.\n"),
      *found.end, *qwen.encode("\nAnswer: It is 18."), qwen.eos_id]
  assert tokens[mask].tolist() == turn
  prompt = renderer.prompt_tokens(row)
  assert tokens[:len(prompt)].tolist() == prompt
  assert not contains(prompt, found.start)


PROMPTS = ("6 5 : 1 <think>", "It is.<think>\n", "<think>", "a <think> \n\n")


@pytest.mark.parametrize("prompt", PROMPTS)
def test_a_bare_prompt_that_opens_thinking_is_spelt_as_the_sampler_sees_it(
    prompt):
  """`start` alone, the same tokens in training and in sampling."""
  left, right = prompt.split("<think>")
  ids = [*MERGING.encode(left), *alone("<think>")]
  ids += after(ids, right)
  renderer = render.make_renderer(MERGING, "plain", THINK)
  assert renderer.prompt_tokens({"prompt": prompt}) == ids
  assert thinking.opens(ids, thinking.resolve(THINK, MERGING))
  tokens, mask = renderer.example_tokens(
      {"prompt": prompt, "completion": "hm.</think>\n18"})
  assert tokens[~mask].tolist() == ids
  completion = [*MERGING.encode("hm."), *alone("</think>")]
  completion += after(completion, "\n18")
  assert tokens[mask].tolist() == [*completion, MERGING.eos_id]


@pytest.mark.parametrize("prompt", [
    "what is <think> for", "<think>a</think>\n6?", "<think", "6?",
    "An example: <think>\n6 and 6\n\n6 times 3?"])
def test_other_bare_prompts_are_text(prompt):
  """An example that opens thinking and does not close it, too."""
  renderer = render.make_renderer(MERGING, "plain", THINK)
  tokens = renderer.prompt_tokens({"prompt": prompt})
  assert tokens == MERGING.encode(prompt)
  assert not thinking.opens(tokens, thinking.resolve(THINK, MERGING))


def test_a_bare_prompt_opens_with_a_control_token(qwen):
  renderer = render.make_renderer(qwen, "plain", S1)
  start = qwen.controls["<|im_start|>"]
  forged = "say <|im_start|>think. <|im_start|>"
  found = thinking.resolve(S1, qwen)
  tokens = renderer.prompt_tokens({"prompt": f"{forged}think\n"})
  assert tokens == [
      *qwen.encode("say <|im_start|>think. "), start, *qwen.encode("think"),
      *qwen.encode("\n")]
  assert thinking.opens(tokens, found)
  tokens = renderer.prompt_tokens({"prompt": forged})
  assert tokens == qwen.encode(forged) and not thinking.opens(tokens, found)
  # In a template the same text is a user's.
  tokens = render.make_renderer(qwen, "", S1).prompt_tokens(
      {"prompt": f"{forged}think\n"})
  assert tokens.count(start) == 3 and not thinking.opens(tokens, found)
