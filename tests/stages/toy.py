"""A task for tests: say `ping`. Few words, so that everything compiles fast.

The rewards are about what was said, never about being right: what is tested
is what becomes of them.
"""

import os
import pathlib
import random
import signal
import time

from posttrain.tasks import scoring

NUMBERS = ["zero", "one", "two", "three", "four", "five", "six", "seven"]
WORDS = ["ping", "pong", "ball", "net", "wait", "yes", "no"]


def corpus():
  yield " ".join(NUMBERS + WORDS)


def asking_corpus():
  """With words for an instruction and its amounts."""
  yield " ".join([*NUMBERS, *WORDS, "ask tokens steps short long 1 2 5"])


def problems(split, *, count=24, thinks=False):
  """Prompts of one to three words; an id is unique across the splits."""
  first = {"train": 0, "validation": 1000, "test": 2000}[split]
  suffix = " <think>" if thinks else ""
  return [
      dict(id=first + i, word=WORDS[i % 3],
           gold=f"{WORDS[i % 3]} ping",
           prompt=" ".join(NUMBERS[(i + j) % 8] for j in range(1 + i % 3))
           + suffix)
      for i in range(count)]


def nameless(split, *, count=24, thinks=False):
  """A task with a fault: all problems have one id."""
  return [row | dict(id=0)
          for row in problems(split, count=count, thinks=thinks)]


def shuffled(split, *, count=24, thinks=False):
  """In another order on process 1, as from an unseeded shuffle."""
  import jax
  rows = problems(split, count=count, thinks=thinks)
  return rows[::-1] if jax.process_index() else rows


def kindred(split, *, count=24, thinks=False):
  """Problems of three clusters."""
  return [row | dict(cluster=row["word"])
          for row in problems(split, count=count, thinks=thinks)]


def demonstrations(split, *, count=24):
  return [row | dict(completion=f"{row['word']} net ping")
          for row in problems(split, count=count)]


def reward(prompt, completion, *, full_text, **columns):
  """1 where the completion says ping, thinking or not."""
  del prompt, completion, columns
  return float("ping" in full_text.split())


def brevity(prompt, completion, *, word, full_text, **columns):
  """0 to 1, more for fewer words; applies to two problems of three."""
  del prompt, completion, columns
  return None if word == "ball" else 1 / (1 + len(full_text.split()))


@scoring.over("group")
def shortest(prompts, completions, *, word, num_tokens, **columns):
  """1 for the shortest of a group, which all have the same word."""
  del prompts, completions, columns
  assert len(set(word)) == 1
  return [float(n == min(num_tokens)) for n in num_tokens]


@scoring.over("batch")
def loud(prompts, completions, *, full_text, **columns):
  """Words, a hundredth each, for whichever completions wait."""
  del prompts, completions, columns
  return [len(text.split()) / 100 for text in full_text]


def constant(prompt, completion, **columns):
  """Teaches nothing."""
  del prompt, completion, columns
  return 1.0


def refuses(prompt, completion, *, gold, **columns):
  """A verifier with a fault: it rejects the gold of one problem."""
  return float(columns["id"] != 3)


def late(prompt, completion, *, word, **columns):
  """1 where the answer says ping; never judges what says pong."""
  words = completion.split()
  if "pong" in words and columns["gold"] != completion:
    return scoring.Score(None, "timeout", f"of {word}")
  return float("ping" in words)


def broken(prompt, completion, **columns):
  """Judges nothing."""
  return scoring.Score(None, "error", "the judge is gone")


def on_process():
  """The number of the process that a worker is of."""
  return int(os.environ.get("POSTTRAIN_PROCESS_ID", "0"))


def of_process(prompt, completion, **columns):
  """1 on process 0; on another it must not be called at all."""
  if on_process():
    raise RuntimeError("called on process 1")
  return 1.0


def disagrees(prompt, completion, *, gold, full_text, **columns):
  """Something else on each process, slower on the first, and not always."""
  if completion == gold:
    return 1.0
  words = full_text.split()
  if on_process() == 0:
    time.sleep(0.05)
  if ("net" in words) == (on_process() == 0):
    raise RuntimeError(f"no judge on process {on_process()}")
  return len(words) / 20 + on_process()


def fails(prompt, completion, *, gold, **columns):
  """On every answer but the gold ones, on process 0."""
  if completion != gold and on_process() == 0:
    raise RuntimeError("the judge has hung up")
  return 1.0


def opinion(text):
  """A word about a turn; it may be the call that ends the run."""
  kill_run_in_call()
  return WORDS[(len(text) + on_process()) % len(WORDS)]


def deadly(prompt, completion, *, gold, full_text, **columns):
  """As `reward`; it may be the call that ends the run."""
  if completion != gold:
    kill_run_in_call()
  return float("ping" in full_text.split())


def kill_run_in_call():
  """SIGKILL to the run in the nth call: KILL_IN_CALL=n:FILE, which counts."""
  if "KILL_IN_CALL" in os.environ:
    number, file = os.environ["KILL_IN_CALL"].split(":")
    with open(file, "a") as counted:
      counted.write("x")
      counted.flush()
      if counted.tell() == int(number):
        os.kill(int(os.environ["RUN_PID"]), signal.SIGKILL)
        time.sleep(60)  # As if it had more to say.


def chance(prompt, completion, *, gold, **columns):
  """Something else each time."""
  return 1.0 if completion == gold else random.SystemRandom().random()


def waits(prompt, completion, *, gold, full_text, **columns):
  """As `reward`, once the file HANG is gone; says that it waits beside it."""
  hang = pathlib.Path(os.environ.get("HANG", "/nowhere"))
  while completion != gold and hang.exists():
    hang.with_suffix(".waits").touch()
    time.sleep(0.01)
  return float("ping" in full_text.split())


def needs_author(prompt, completion, *, author, **columns):
  """Asks for a column that no problem has."""
  raise AssertionError


def picky(prompt, completion, *, word, **columns):
  """1 where the problem's own word is said; of a net it knows nothing."""
  del prompt, columns
  words = completion.split()
  return None if "net" in words else float(word in words)


def extract(completion):
  """The last word."""
  words = completion.split()
  return words[-1] if words else None


def whole(completion):
  """All of it, be it nothing."""
  return f"<{completion}>"
