"""Processes that wait for each other, in threads and for real."""

import json
import os
import pathlib
import re
import socket
import subprocess
import sys
import threading
import time

import pytest
from jax._src import clusters

from posttrain import distributed, host_connections, rendezvous

ROOT = pathlib.Path(__file__).parents[1]


def call_all(port, numbers, of, seconds, delay=lambda number: 0.0):
  """The message or the answers that each process gets, by its number."""
  results = {}
  def one(index, number):
    time.sleep(delay(number))
    try:
      results[index] = rendezvous.meet(
          f"127.0.0.1:{port}", of, number, seconds=seconds, bind="127.0.0.1")
    except rendezvous.StartError as error:
      results[index] = str(error)
  threads = [threading.Thread(target=one, args=item, daemon=True)
             for item in enumerate(numbers)]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join(90)
    assert not thread.is_alive()
  return results


def test_all_return_when_the_last_has_come(free_port):
  before = time.monotonic()
  found = call_all(
      free_port, range(8), 8, 60, lambda number: 0.3 * (number in (0, 5)))
  assert 0.3 < time.monotonic() - before < 30
  with socket.create_server(("127.0.0.1", free_port)):
    pass  # The address is free for JAX, though the connections stay.
  hosts = dict.fromkeys(range(8), socket.gethostname())
  assert all(names == hosts for names, _ in found.values())
  _, first = found[0]
  assert set(first) == set(range(1, 8))
  for number, connection in first.items():
    connection.sendall(bytes([number]))  # What follows the verdict is kept.
    _, connections = found[number]
    assert set(connections) == {0}
    assert connections[0].recv(9) == bytes([number])


def test_those_that_are_there_name_the_missing(free_port, monkeypatch):
  found = call_all(free_port, (0, 1, 4), 6, 4)
  assert len(set(found.values())) == 1
  assert "3 of 6 processes did not start: process 2, process 3, process 5. "\
      in found[0]
  assert f"There are process 0 on {socket.gethostname()}" in found[0]
  monkeypatch.setenv(rendezvous.SLICES, "r1-0,r1-1")
  found = call_all(free_port, (0, 1, 4), 6, 4)
  assert "worker 2 of r1-0, worker 0 of r1-1, worker 2 of r1-1." in found[0]


def test_without_process_0_the_others_name_it(free_port):
  found = call_all(free_port, (1, 2), 3, 0.4)
  for message in found.values():
    assert re.match(r"process 0 did not start, or cannot be reached from .* at "
                    f"127.0.0.1:{free_port}", message)


def test_two_processes_of_one_number_stop_all(free_port):
  found = call_all(
      free_port, (0, 1, 1, 2), 4, 6, lambda number: 0.3 * (number == 0))
  assert "process 1 of 4 on " in found[0]
  assert "one too many" in found[0]


def test_strangers_and_the_dead_are_not_counted(free_port):
  """A port scanner, a caller that hangs up, and one that comes back."""
  def connect(line):
    while True:
      try:
        caller = socket.create_connection(("127.0.0.1", free_port), 5)
        caller.sendall(line)
        return caller
      except OSError:
        time.sleep(0.02)
  def disturb():
    connect(b"GET / HTTP/1.1\r\n\r\n").close()
    connect(json.dumps(
        {"process": 1, "of": 3, "host": "gone"}).encode() + b"\n").close()
  other = threading.Thread(target=disturb)
  other.start()
  def when(number):  # Process 2 comes when they have left.
    if number == 2:
      other.join()
    return 0.2 * number
  found = call_all(free_port, (0, 2), 3, 6, when)
  assert "1 of 3 processes did not start: process 1." in found[0]
  hosts, _ = call_all(free_port, (0, 1, 2), 3, 60)[0]
  assert set(hosts) == {0, 1, 2}


def test_a_pod_of_which_one_host_is_missing_is_refused(tmp_path, free_port):
  """The command line as process 0, which JAX alone would abort; here, 2."""
  told = []
  def process_2():
    try:
      rendezvous.meet(f"127.0.0.1:{free_port}", 3, 2, seconds=60)
    except rendezvous.StartError as error:
      told.append(str(error))
  other = threading.Thread(target=process_2, daemon=True)
  other.start()
  process = subprocess.run(
      [sys.executable, "-m", "posttrain", "train",
       "--config=configs/tiny.py:debug", f"--workdir={tmp_path / 'run'}"],
      cwd=ROOT, capture_output=True, text=True, timeout=120,
      env=os.environ | {
          "JAX_PLATFORMS": "cpu", "POSTTRAIN_START_SECONDS": "6",
          "POSTTRAIN_COORDINATOR": f"127.0.0.1:{free_port}",
          "POSTTRAIN_NUM_PROCESSES": "3", "POSTTRAIN_PROCESS_ID": "0"})
  other.join(60)
  assert process.returncode == 1
  (message,) = told
  assert process.stderr == f"posttrain: {message}\n"
  assert "1 of 3 processes did not start: process 1. There are" in message
  assert not (tmp_path / "run").exists()


def test_auto_asks_the_cluster_that_jax_finds(monkeypatch):
  monkeypatch.setattr(clusters.ClusterEnv, "_cluster_types", [])
  with pytest.raises(ValueError, match="knows no cluster"):
    distributed.detect(5)
  class Cluster(clusters.ClusterEnv):
    name = "made_up"
    is_env_present = classmethod(lambda cls: True)
    get_coordinator_address = classmethod(lambda cls, **kwargs: "host:12")
    get_process_count = classmethod(lambda cls: 4)
    get_process_id = classmethod(lambda cls: 3)
    get_local_process_id = classmethod(lambda cls: None)
  assert distributed.detect(5) == ("host:12", 4, 3)
  calls = []
  monkeypatch.setenv(distributed.COORDINATOR, "auto")
  def meet(*arguments, **more):
    calls.append((arguments, more))
    return {}, {}
  monkeypatch.setattr(rendezvous, "meet", meet)
  monkeypatch.setattr(host_connections, "use", lambda line: None)
  monkeypatch.setattr(distributed, "delay_aborts", lambda: None)
  monkeypatch.setattr(
      distributed.jax.distributed, "initialize",
      lambda *arguments, **more: calls.append((arguments, more)))
  distributed.initialize()
  assert calls[0] == (("host:12", 4, 3), {"seconds": 300, "bind": ""})
  # Of JAX too, and it is slower to find that a process is lost.
  arguments, more = calls[1]
  assert arguments == ("host:12", 4, 3)
  assert more["coordinator_bind_address"] is None
  assert more["heartbeat_timeout_seconds"] > 100
