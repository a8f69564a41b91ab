"""What is wrong with a command is said before anything compiles."""

import importlib.util
import subprocess
import sys

import pytest

from posttrain.cli import main
from posttrain.plan import environment, measure, topology


def plan(*flags):
  return main.main(["plan", "--config=configs/tiny.py:debug", *flags])


@pytest.fixture
def no_libtpu(monkeypatch):
  monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)


def test_a_missing_compiler_is_named(no_libtpu, capsys):
  assert plan("--topology=v5e:2x2") == 2
  assert "pip install 'posttrain[plan]'" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["v5p-8", "v6e:3x3", "trillium:2x2", "v5e"])
def test_an_unknown_topology_lists_those_there_are(name, no_libtpu, capsys):
  assert plan(f"--topology={name}") == 2
  error = capsys.readouterr().err
  assert "v5e:1x1, v5e:2x2" in error and "tpu7x:4x4x4" in error
  assert ("not of cores" in error) == (name == "v5p-8")


@pytest.mark.parametrize("flags, message", [
    (("--topology=v5e:2x2", "--config.sed=1"), "sed: no such key"),
    (("--topology=v5e:2x2", "--compile-best=2"), "without --sweep"),
    (("--topology=v5e:2x2", "--num_slices=0"), "[1, 65536]"),
    ((), "--topology"),
    (("--topology=v5e:2x2", "--slices=2"), "no flag --slices")])
def test_wrong_flags(flags, message, no_libtpu, capsys):
  assert plan(*flags) == 2
  assert message in capsys.readouterr().err


@pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="needs libtpu")
@pytest.mark.parametrize("flags, message", [
    (("--sweep",), "set mesh.roles='shared'"),
    (("--config.mesh.sampling.devices=4",), "leaves process 0 no device"),
    (("--num_slices=2", "--config.mesh.data=-1", "--config.mesh.fsdp=1",
      "--config.mesh.sampling.fsdp=1", "--config.mesh.sampling.tensor=2"),
     "mesh.sampling.fsdp to a multiple of 2")])
def test_split_roles_that_cannot_be_planned(flags, message, capsys):
  assert plan("--topology=v5e:2x2", "--config.mesh.roles=split", *flags) == 2
  assert message in capsys.readouterr().err


def test_the_environment_comes_before_jax():
  """Nothing that the command needs for it imports JAX."""
  code = (
      "import sys; from posttrain.cli import main; from posttrain.plan import "
          "environment, topology; topology.parse('v5e:2x2', 2); "
          "print('jax' in sys.modules)")
  found = subprocess.run(
      [sys.executable, "-c", code], capture_output=True, text=True, check=True)
  assert found.stdout.strip() == "False"


def test_sizes_of_slices():
  slices = topology.parse("tpu7x:2x2x1", 2)
  assert (slices.num_chips, slices.num_devices) == (8, 16)
  assert str(slices) == "2 x tpu7x:2x2x1"
  with pytest.raises(environment.PlanError, match="num_slices=0"):
    topology.parse("v5e:2x2", 0)


HBM = (
    "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required "
    "for HLO temporaries ({}) exceeds available HBM (15.75G).")
SPACE = (
    "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in "
    "memory space hbm. Used {} of 15.75G hbm. Exceeded hbm capacity by 2.10G.")


@pytest.mark.parametrize("size, needed", [
    ("35.59G", 35.59 * 2**30), ("1.06T", 1.06 * 2**40), ("2P", 2 * 2**50),
    ("1.5E", 1.5 * 2**60), ("17408.0M", 17 * 2**30), ("512.5K", 512.5 * 2**10),
    ("812B", 812), ("812", 812), ("17.85GiB", 17.85 * 2**30)])
@pytest.mark.parametrize("message", [HBM, SPACE])
def test_the_message_of_a_compiler_that_ran_out(message, size, needed):
  """As libtpu 0.0.42 writes them; see docs/pods.md."""
  assert measure.needed_bytes(message.format(size)) == int(needed)


def test_another_error_of_the_compiler_is_no_want_of_memory():
  for message in (
      "INTERNAL: (35.59G) exceeds available", "RESOURCE_EXHAUSTED: quota",
      SPACE.replace("hbm", "vmem").format("20.1M")):
    assert measure.needed_bytes(message) is None
