"""Seventeen hostile rewards, and a harmless one, on a toy task.

A problem's `kind` says what its reward does. Gold answers are judged as they
should be. Each call leaves the id of its process, and of those that it starts,
in the folder of the environment variable HOSTILE_PIDS.
"""

import ctypes
import os
import pathlib
import signal
import sys
import threading
import time

# What becomes of the score. A reward that returns 1 has one, whatever it leaves
# behind.
STATUSES = dict(
    harmless="ok", raises="error", nan="error", infinite="error",
    huge="error", text="error", listed="error", hangs="timeout",
    exits="error", leaves="error", crashes="error", children="ok",
    closes="ok", floods="ok", holds="error", forks="ok",
    ignores="timeout", lingers="ok")
GOLD = "gold"
held = []


def corpus():
  yield " ".join(["say wait", GOLD, *STATUSES])


def problems(split):
  return [dict(id=i, kind=kind, gold=GOLD, prompt=f"say {kind}")
          for i, kind in enumerate(STATUSES)]


def reward(prompt, completion, *, kind, **columns):
  if completion == GOLD:
    return 1.0
  note()
  return globals().get(kind, lambda: 1.0)()


def never(prompt, completion, **columns):
  """Judges nothing, the gold answers neither."""
  note()
  hangs()


def varied(prompt, completion, *, full_text, **columns):
  """Differs within a group, so that there is something to learn."""
  return len(full_text.split()) / 10


def extract(completion):
  """An extractor is as hostile: it fails on every answer but the gold ones."""
  if completion != GOLD:
    raise LookupError(f"no answer in {len(completion)} characters")
  return completion


def note():
  folder = os.environ.get("HOSTILE_PIDS")
  if folder:
    (pathlib.Path(folder) / str(os.getpid())).touch()


def start_child():
  if not os.fork():
    note()
    time.sleep(100)
    os._exit(0)


def raises():
  raise RuntimeError("the judge has hung up")


def nan():
  return float("nan")


def infinite():
  return float("inf")


def huge():
  return 10**400


def text():
  return "1"


def listed():
  return [1.0]


def hangs():
  time.sleep(100)


def exits():
  sys.exit(0)


def leaves():
  os._exit(0)


def crashes():
  ctypes.string_at(0)


def children():
  for _ in range(5):
    start_child()
  return 1.0


def closes():
  os.closerange(0, 256)
  return 1.0


def floods():
  for _ in range(64):
    print("x" * 2**20)
  return 1.0


def holds():
  held.append(b"x" * 2**31)
  return 1.0


def forks():
  """A fork bomb that stops at 32 processes."""
  first = os.getpid()
  for _ in range(5):
    os.fork()
    note()
  if os.getpid() != first:
    time.sleep(100)
    os._exit(0)
  return 1.0


def ignores():
  signal.signal(signal.SIGTERM, signal.SIG_IGN)
  time.sleep(100)


def lingers():
  """A thread goes on behind the return."""
  threading.Thread(target=time.sleep, args=(100,)).start()
  return 1.0
