"""Delimiters as text in the machine. Oracle: a search of text (`texts`)."""

import contextlib
import functools

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from posttrain import sharding
from posttrain.sampler.engine import Engine
from posttrain.sampler.requests import Request, Settings, most_slots
from tests.model import build
from tests.sampler import test_budget
from tests.sampler.forcing import Limits
from tests.sampler.texts import Account, Texts

STOP, WORD = chr(256), chr(257)  # Control tokens.
PIECES = (
    STOP, WORD, "<", "/", ">", "t", "h", ".", " ", "\n", "a", "W", "th", "</",
    ".</", " </", "a<", "></", "th>", ">\n", ">\n\n", "\n\n", "h>a", "<th>",
    "</th>", "a</th>.", "/t", "t<", "\n\n<", ".\n\n</t", "Wa")
NAMED = (
    Texts(PIECES, start="<th>", end="</th>", newline="\n", final_answer="a.",
          waits=("W", "a<"), step="\n\n", stop_ids=(0,)),
    Texts(PIECES, start="<th>", end="</th>", delimiters=(WORD, "</t", STOP),
          newline="\n", waits=("Wa\n",), stop_ids=(0,), step="."),
    Texts(PIECES, start="", end=WORD + "a", delimiters=(WORD, "\n\n", "t<"),
          newline="\n", final_answer="W", waits=("", "W."), stop_ids=(0,)),
    Texts(PIECES, start="th", end="</th>\n", delimiters=("</th>", "th", "h>a"),
          waits=("</t",), stop_ids=(0,), step="<"),
)
ROWS = 16


def random_texts(seed):
  """Strings and merges over three letters, so that all overlap with all."""
  rng = np.random.default_rng(seed)
  letters = "ab\n"
  word = lambda least, most: "".join(
      rng.choice([*letters], rng.integers(least, most + 1)))
  merges = dict.fromkeys(word(2, 5) for _ in range(rng.integers(4, 16)))
  return Texts(
      (STOP, WORD, *letters, *merges), end=word(1, 4), start=word(0, 3),
      delimiters=tuple(word(1, 4) for _ in range(rng.integers(0, 3))),
      newline=word(0, 1), final_answer=word(0, 2),
      waits=tuple(word(0, 3) for _ in range(rng.integers(1, 3))),
      step=word(0, 2), stop_ids=(0,))


CASES = (*NAMED, *map(random_texts, range(8)))


@pytest.fixture(autouse=True)
def one_device():
  with jax.set_mesh(sharding.make_mesh(1, 1, devices=jax.devices()[:1])):
    yield


def writer(strings, seed):
  """A model that often goes on with a string that it has begun, or begins it
  inside of a token."""
  targets = [s for s in (
      strings.start, strings.step, *strings.ways_out) if s]

  def fits(piece, target, begun):
    rest = target[begun:]
    return rest.startswith(piece) or piece.startswith(rest) or any(
        piece.endswith(target[:n]) for n in range(1, len(target)))

  def model(row, context):
    rng = np.random.default_rng([seed, row, *context])
    ranked = rng.permutation(strings.vocab_size).tolist()
    if rng.random() < 0.7:
      target = targets[rng.integers(len(targets))]
      text = strings.text(context)
      begun = max(n for n in range(len(target))
                  if text.endswith(target[:n]))
      ranked.sort(key=lambda t: not fits(
          strings.vocabulary[t], target, begun))
    return ranked
  return model


rows_of_limits = st.lists(
    st.builds(
        Limits, maximum=st.integers(-1, 9), minimum=st.integers(0, 5),
        waits=st.integers(0, 3), tokens=st.integers(1, 40),
        truncate=st.booleans(), order=st.sampled_from([(), (0,), (0, 0)]),
        steps=st.integers(-1, 4)),
    min_size=ROWS, max_size=ROWS)


@pytest.mark.parametrize("index", range(len(CASES)))
@settings(max_examples=12, deadline=None, derandomize=True)
@given(limits=rows_of_limits, seed=st.integers(0, 10**6))
def test_the_machine_follows_the_text(index, limits, seed):
  strings = CASES[index]
  rng = np.random.default_rng(seed)
  prompts = rng.integers(2, strings.vocab_size, (ROWS, 2)).tolist()
  in_thinking = (rng.random(ROWS) < 0.7).tolist()
  model = writer(strings, seed)
  rows = test_budget.drive(model, prompts, in_thinking, strings, limits)
  tape = strings.tables().tape
  longest_head = np.diff(np.flatnonzero(
      tape.tokens[:tape.heads_end] < 0)).max(initial=2) - 1
  for i, row in enumerate(rows):
    account = Account(
        functools.partial(model, i), prompts[i], strings, limits[i])
    assert row == account(in_thinking[i])
    assert_limits(row, account, strings, limits[i], longest_head)


def assert_limits(row, account, strings, limits, longest_head):
  """What holds of every row, whatever it wrote."""
  assert len(row.tokens) <= limits.tokens
  # A token may have several steps in it, and a head several tokens.
  assert limits.maximum < 0 or row.thinking <= max(
      limits.maximum + longest_head - 1, 1)
  if row.closed == "natural":
    assert row.thinking >= limits.minimum
  asked = Request(prompt=(1,), max_tokens=limits.tokens,
                  num_waits=limits.waits)
  assert 1 + len(account.choices) <= most_slots(asked, strings.tables())


@pytest.mark.parametrize("tokens", range(1, 6))
def test_an_end_of_start_that_is_forced_again_is_no_thinking(tokens):
  """Wherever `max_tokens` cuts it off."""
  strings = Texts(
      (STOP, *"<th>/W", "<th></th>"), start="<th>", end="</th>",
      waits=("W",), stop_ids=(0,))
  limits = Limits(waits=1, tokens=tokens)
  model = lambda context: [7]
  row, = test_budget.drive(
      lambda _, context: model(context), [[6]], [False], strings, [limits])
  assert row == Account(model, [6], strings, limits)(False)
  assert (row.thinking, row.waits) == (tokens // 5, 1)


# "<E>" of the traces is a control token, all other words are text. "<S>" as
# one token is written only where the trace has it banned.
TRACE_PIECES = (
    STOP, "<S>", *sorted(set("\n<S>thinkanswerFi lA:WtP,bcde")), "<S", "S>",
    "a<", "\n<", "a\n", "b\n", ">think\n", ">an", "b,", "it", "th", "ink",
    "S>answ", "\n<S", "al A", "c\n", "a<S", "in", "k\n")
TRACE_WAITS = ("Wait", "", "Wait,b")
TRACES = Texts(
    TRACE_PIECES, start="<S>think", end="<S>answer", delimiters=("<S>", STOP),
    newline="\n", final_answer="\nFinal Answer:", waits=TRACE_WAITS,
    stop_ids=(0,))


def text_of(words):
  return "".join(STOP if word == "<E>" else word for word in words)


def cut(text, rng):
  """Spells a text in any of the ways that there are, "<S>" in parts."""
  ids = []
  while text:
    fits = [i for i, piece in enumerate(TRACE_PIECES)
            if text.startswith(piece) and piece != "<S>"]
    # Longer ones more often, so that they merge across words.
    weights = np.array([len(TRACE_PIECES[i])**2 for i in fits], float)
    ids.append(int(rng.choice(fits, p=weights / weights.sum())))
    text = text[len(TRACE_PIECES[ids[-1]]):]
  return ids


def spell_script(case, rng):
  script = []
  for scene in case["script"]:
    *parts, last = text_of(scene[:-1]).split("<S>")
    for part in parts:
      script += [*cut(part, rng), 1]
    script += cut(last + text_of(scene[-1:]), rng)
  return script


def told(case, script, maximum):
  """The account of a trace in spelt tokens, up to where the answer begins."""
  rest = list(script)

  def model(_):
    while rest:
      yield rest.pop(0)

  account = Account(
      model, TRACES.spell("P<S>think"), TRACES, Limits(
          maximum=maximum, minimum=case.get("min", 0),
          waits=case.get("waits", 0),
          order=(TRACE_WAITS.index(text_of(case.get("wait", []))),)),
      answer=False)
  with contextlib.suppress(StopIteration):  # The script is over.
    account(True)
  return account


def as_requests(case):
  """Spells a trace in four ways: a request each, and the text to come.

  Limits of the traces count words. The same text has some limit in tokens.
  """
  want = text_of(case["out"]).removeprefix("P<S>think")
  for seed in range(4):
    script = spell_script(case, np.random.default_rng(seed))
    accounts = {maximum: told(case, script, maximum) for maximum in range(40)}
    same = [maximum for maximum, account in accounts.items()
            if TRACES.text(t.id for t in account.tokens) == want]
    assert same, (case["name"], [TRACE_PIECES[i] for i in script])
    account = accounts[same[-1]]
    limits = account.limits
    yield want, account, Request(
        prompt=TRACES.spell("P<S>think"), max_tokens=80, num_waits=limits.waits,
        max_thinking_tokens=limits.maximum, wait_order=limits.order,
        min_thinking_tokens=limits.minimum,
        script=np.array([*account.choices, *(-1,) * 60], np.int32))


def test_the_published_traces_spelt_with_merges():
  """Through the decode loop: texts, provenance and waits of each trace."""
  config = build.make_config(vocab_size=len(TRACE_PIECES))
  queue = Engine(
      build.load(config, build.random_params(config)), TRACES.tables(),
      Settings(max_num_seqs=16, max_seq_len=160, min_seq_len=160, chunk=32,
               prefill_chunk=16, max_waits=1))
  asked = [(case, *found) for case in test_budget.TRACES + test_budget.QUIRKS
           for found in as_requests(case)]
  numbers = [queue.submit(request) for *_, request in asked]
  by_number = {done.id: done for done in queue.results()}
  heads = merged = 0
  for number, (_, want, account, request) in zip(
      numbers, asked, strict=True):
    done = by_number[number]
    assert not done.error
    length = len(account.tokens)
    assert TRACES.text(done.tokens[:length]) == want
    assert done.tokens[:length] == [t.id for t in account.tokens]
    assert [test_budget.SOURCES[p] for p in done.provenance[:length]] == [
        t.source for t in account.tokens]
    assert done.think_length == account.thinking <= (
        request.max_thinking_tokens)
    assert done.wait_count == account.row.waits
    heads += sum(a.source == "forced" and a.counts for a in account.tokens)
    merged += sum("<" in TRACE_PIECES[t][1:] for t in done.tokens)
  assert len(asked) == 60 and heads > 20 and merged > 15
