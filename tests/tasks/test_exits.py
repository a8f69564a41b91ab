"""Real processes that task code tries to end with status 0."""

import json
import socket
import subprocess
import sys

import pytest

RUN = """
import os, sys, threading
from posttrain.tasks import exits

try:
  with exits.refused():
{body}
except exits.Unfinished as error:
  print(error, file=sys.stderr)
  sys.exit(9)
print("finished")
"""


def run(body):
  indented = "\n".join(f"    {line}" for line in body.splitlines())
  return subprocess.run(
      [sys.executable, "-c", RUN.format(body=indented)], text=True,
      capture_output=True, timeout=120)


@pytest.mark.parametrize("body, status, said", [
    ("sys.exit(0)", 9, "left with status 0 (a SystemExit) before the run"),
    ("sys.exit()", 9, "left with status 0 (a SystemExit) before the run"),
    ("sys.exit(75)", 9, "left with status 75 (a SystemExit) before the run"),
    ("sys.exit('why')", 9, "left with status why (a SystemExit)"),
    # What says that a run is preempted is an exit of our own.
    ("raise type('Preempted', (SystemExit,), {})(75)", 75, ""),
    ("os._exit(0)", 1, "os._exit(0) was called before the run had finished"),
    ("os._exit(75)", 1, "os._exit(75) was called before the run had"),
    ("from os import _exit\n_exit(0)", 1, "os._exit(0) was called"),
    ("thread = threading.Thread(target=os._exit, args=(0,))\n"
     "thread.start(); thread.join()", 1, "os._exit(0) was called"),
    ("child = os.fork()\nif not child:\n  os._exit(0)\n"
     "assert os.waitpid(child, 0)[1] == 0", 0, ""),
])
def test_an_unfinished_run_does_not_end_with_status_0(body, status, said):
  result = run(body)
  assert result.returncode == status, result.stderr
  assert said in result.stderr
  assert ("finished" in result.stdout.splitlines()) == (status == 0)


def test_behind_the_run_it_is_pythons_own_again():
  result = run("pass")
  assert (result.returncode, result.stdout) == (0, "finished\n")
  result = subprocess.run(
      [sys.executable, "-c", "import os\nfrom posttrain.tasks import exits\n"
       "with exits.refused(): pass\nos._exit(0)"], timeout=60)
  assert result.returncode == 0


def test_before_the_end_the_lease_is_let_go_and_the_others_are_told(tmp_path):
  ours, theirs = socket.socketpair()
  result = subprocess.run(
      [sys.executable, "-c", """if True:
      import os, socket, sys, threading
      from posttrain import host_connections as line, lease
      from posttrain.cli import arguments, main
      def work(argv):
        assert lease.LeaseRequest(sys.argv[1]).try_acquire()
        connection = socket.socket(fileno=int(sys.argv[2]))
        line.use(line.Connections(
            1, {0: "a", 1: "b"}, {0: connection}, lost_seconds=60).start())
        thread = threading.Thread(target=os._exit, args=(0,))
        thread.start()
        thread.join()
      arguments.parse = lambda argv: ("work", argv)
      main.VERBS["work"] = work
      main.main(["work"])
      """, str(tmp_path), str(theirs.fileno())], text=True,
      pass_fds=[theirs.fileno()], capture_output=True, timeout=60)
  theirs.close()
  assert result.returncode == 1, result.stderr
  assert "os._exit(0) was called" in result.stderr
  assert not (tmp_path / ".lease").exists()
  ours.settimeout(10)
  told = b"".join(iter(lambda: ours.recv(1 << 16), b"")).splitlines()
  assert {"status": 1} in map(json.loads, told)
