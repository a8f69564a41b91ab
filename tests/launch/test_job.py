"""One description, its checks, and the names of slices."""

import json
import pathlib

import pytest

from launch import accelerators
from launch import job as job_lib
from posttrain.plan import topology as topology_lib

RUN = ["--", "train", "--config=configs/tiny.py:debug", "--workdir=/mnt/runs"]
FLAGS = ["--name=r1", "--topology=v5e:2x4", *RUN]


@pytest.fixture(autouse=True)
def in_the_checkout(monkeypatch):
  monkeypatch.chdir(pathlib.Path(__file__).parents[2])


def read(*argv, **kwargs):
  return job_lib.Parser("text").read(argv, **kwargs)[0]


@pytest.mark.parametrize("status, means", [
    (0, 0), (1, 1), (69, 69), (75, 75), (143, 75), (-15, 75), (-9, 137)])
def test_what_sigterm_ended_is_preempted(status, means):
  assert job_lib.exit_status(status) == means


def with_command(*command):
  return [*FLAGS[:2], "--", *command]


@pytest.mark.parametrize("argv, message", [
    (FLAGS[1:], "--name is missing"),
    ([FLAGS[0], *RUN], "--topology is missing"),
    (["--name=R_1", *FLAGS[1:]], "--name=R_1: needed"),
    (["--num_slices=0", *FLAGS], "--num_slices=0 is below 1"),
    (["--topology=v5e-8", FLAGS[0], *RUN], "v5e-8 is no slice .* not of cores"),
    (FLAGS[:2], "nothing to run"),
    (with_command("trian", "--workdir=/w"), "the nearest is train"),
    (with_command("plan", "--topology=v5e:2x2"), "'plan' runs on one machine"),
    (with_command("train", "--workdir=/w", "--config=configs/tny.py"),
     "nearest is configs/tiny.py"),
    (with_command("train", "--workdir=/w", "--config=configs/tiny.py",
                  "--config.sed=1"), "sed: no such key"),
    (with_command("train", "--workdir=runs/w", "--config=configs/tiny.py"),
     "--workdir=runs/w: needed an absolute path"),
    (["--secret=ABSENT", *FLAGS], "the environment has no ABSENT"),
    (["--secret=A=b", *FLAGS], "the name of a variable, not its value"),
])
def test_what_is_wrong_is_said_before_anything_runs(argv, message):
  with pytest.raises(job_lib.JobError, match=message):
    read(*argv)


def test_a_secret_in_the_command_is_refused(monkeypatch):
  monkeypatch.setenv("KEY", "hunter2hunter2")
  with pytest.raises(job_lib.JobError, match="the value of KEY is") as error:
    read("--secret=KEY", "--setup=login hunter2hunter2", *FLAGS)
  assert "hunter2" not in str(error.value)
  assert read("--secret=KEY", *FLAGS).secrets == ("KEY",)


def test_flags_from_a_file(tmp_path):
  file = tmp_path / "pod"
  file.write_text("--topology=v5p:4x4x4\n--num_slices=2\n--zone=z\n")
  job = read(f"@{file}", "--name=r1", *RUN)
  assert str(job.topology) == "2 x v5p:4x4x4" and job.zone == "z"
  assert job.command == tuple(RUN[1:])


def test_every_slice_of_a_plan_has_one_name():
  """Google Cloud publishes a few of them; and no two sizes share one."""
  assert set(accelerators.NAMES) == set(topology_lib.CHIPS)
  types = {}
  for chip in topology_lib.CHIPS.values():
    for size in chip.sizes:
      found = topology_lib.parse(f"{chip.name}:{size}", 2)
      types[found.name] = accelerators.accelerator_type(found)
      hosts = accelerators.hosts_per_slice(found)
      assert (hosts * accelerators.chips_per_host(found) * 2
              == found.num_chips)
  assert len(set(types.values())) == len(types)
  published = json.loads("""{
      "v5e:4x4": "v5litepod-16", "v5e:16x16": "v5litepod-256",
      "v5p:2x2x1": "v5p-8", "v5p:4x4x4": "v5p-128", "v5p:8x8x8": "v5p-1024",
      "v6e:1x1": "v6e-1", "v6e:8x16": "v6e-128", "tpu7x:4x4x4": "tpu7x-128"}""")
  assert published.items() <= types.items()
  with pytest.raises(ValueError, match="offered on GKE only"):
    accelerators.runtime_version(topology_lib.parse("tpu7x:2x2x1"))
