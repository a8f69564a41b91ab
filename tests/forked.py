"""Runs of the command line, forked from a process that has imported it all.

A start costs no import, and what was compiled once is read from a directory:
a run can be killed many times in a minute.
"""

import multiprocessing
import os
import pathlib
import signal
import time

from posttrain.telemetry import metrics

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload([
    "posttrain.pipeline", "posttrain.distributed", "tests.stages.sft_run",
    "tests.pipeline_run"])


def start(argv, log, compiled, devices=1, **environment):
  """`posttrain ARGV`; its output goes to the file `log`.

  It misbehaves as the environment says, see `pipeline_run`.
  """
  process = _context.Process(
      target=_main,
      args=(list(argv), str(log), str(compiled), devices, environment))
  process.start()
  return process


def _main(argv, log, compiled, devices, environment):
  os.environ |= environment
  file = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
  os.dup2(file, 1)
  os.dup2(file, 2)
  os.environ["XLA_FLAGS"] = (  # As `make test` has it, on other devices.
      "--xla_backend_optimization_level=0 --xla_backend_extra_options="
      "xla_cpu_disable_new_fusion_emitters "
      "--xla_cpu_parallel_codegen_split_count=1 "
      f"--xla_force_host_platform_device_count={devices}")
  import jax
  jax.config.update("jax_compilation_cache_dir", compiled)
  jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
  jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
  from posttrain import __main__
  from tests import pipeline_run
  pipeline_run.misbehave()
  __main__.run(argv)


def finish(process, log, status=0):
  process.join(600)
  assert process.exitcode == status, pathlib.Path(log).read_text()[-8000:]


def kill(process):
  os.kill(process.pid, signal.SIGKILL)
  process.join()


def wait_until(process, log, holds):
  """Until `holds()`; the run must not end before."""
  deadline = time.monotonic() + 600
  while not holds():
    assert process.is_alive(), pathlib.Path(log).read_text()[-8000:]
    assert time.monotonic() < deadline
    time.sleep(0.0005)


def last_step(path):
  file = path / "metrics.jsonl"
  rows = metrics.read(file) if file.exists() else []
  return rows[-1]["step"] if rows else 0


def half_written(path, stage):
  """Names of checkpoints that are being written."""
  folder = path / stage / "checkpoints"
  names = [p.name for p in folder.iterdir()] if folder.exists() else []
  return [name for name in names if not name.isdecimal()]
