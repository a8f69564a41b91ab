"""Delimiters as text in the machine. Oracle: a search of text (`texts`)."""

import functools

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from posttrain import sharding
from posttrain.sampler.requests import Request, most_slots
from tests.sampler import test_budget, texts
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
@settings(max_examples=25, deadline=None, derandomize=True)
@given(limits=rows_of_limits, seed=st.integers(0, 10**6))
def test_the_machine_follows_the_text(index, limits, seed):
  strings = CASES[index]
  rng = np.random.default_rng(seed)
  prompts = rng.integers(2, strings.vocab_size, (ROWS, 2)).tolist()
  in_thinking = (rng.random(ROWS) < 0.7).tolist()
  model = writer(strings, seed)
  rows = test_budget.drive(model, prompts, in_thinking, strings, limits)
  longest_head = strings.tables().tape.heads[3].max(initial=1)
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
