"""A task for tests whose delimiters merge with the text around them.

The tokenizer of `build.merging` has no token for "<think>" and "</think>". Half
of the prompts open the thinking, and the others leave that to the model.
"""

import itertools
import json
import os

from tests.text import build

LEFT = (".", " ", ">", "\n", "7")
RIGHT = ("\n", "\n\n", " ", "1")
THOUGHTS = ("so it is", "it is 18", "so, and so it is")
# Names, in the environment, a file of what rewards were given.
GIVEN = "POSTTRAIN_TEST_MERGED_GIVEN"


def _rows():
  """Yields (opens, thought, what stands around "</think>")."""
  return itertools.product(
      (True, False), THOUGHTS, itertools.product(LEFT, RIGHT))


def texts() -> list[tuple[str, str]]:
  """Pairs of a prompt and a completion."""
  return [
      (f"{i % 7}?{'<think>' if opens else ''}",
       f"{'' if opens else '<think>'}{thought}{left}</think>{right}It is {i}")
      for i, (opens, thought, (left, right)) in enumerate(_rows())]


def tokenizer():
  return build.merging(tuple(map("".join, texts())), vocab_size=340)


def demonstrations(split):
  del split
  return [dict(id=i, prompt=prompt, completion=completion)
          for i, (prompt, completion) in enumerate(texts())]


def problems(split, *, count=6):
  del split
  return [dict(id=i, prompt=f"{i % 7}?{'<think>' if i % 2 else ''}",
               gold="It is 3") for i in range(count)]


def reward(completion, *, full_text, thinking, **columns):
  """More for an answer with more 1s in it, which is about half of them."""
  del columns
  with open(os.environ[GIVEN], "a") as file:
    print(json.dumps([completion, thinking, full_text]), file=file)
  return float("1" in completion or completion == "It is 3")
