"""The environment that `make` makes: by which Python, with which versions."""

import os
import pathlib
import shutil
import subprocess
import sys
import tomllib

import pytest
from packaging import requirements

ROOT = pathlib.Path(__file__).parents[1]
PYTHONS = ("3.11", "3.12")


def planned(folder, *arguments):
  """Lists what `make lint` would run with an environment that exists."""
  (folder / "bin").mkdir(parents=True, exist_ok=True)
  python = folder / "bin/python"
  python.unlink(missing_ok=True)
  python.symlink_to(sys.executable)
  (folder / ".installed").touch()
  return subprocess.run(
      ["make", "--dry-run", "lint", f"VENV={folder}", *arguments], cwd=ROOT,
      env={k: v for k, v in os.environ.items() if k != "PYTHON"}, check=True,
      capture_output=True, text=True).stdout


@pytest.mark.skipif(not shutil.which("make"), reason="there is no make")
def test_an_environment_of_another_python_is_not_reused(tmp_path):
  other = tmp_path / "python"
  other.write_text("#!/bin/sh\necho 3 99\n")
  other.chmod(0o755)
  assert "-m venv" not in planned(tmp_path / "venv")
  assert "-m venv" not in planned(
      tmp_path / "venv", f"PYTHON={sys.executable}")
  assert f"{other} -m venv --clear" in planned(
      tmp_path / "venv", f"PYTHON={other}")


def test_every_dependency_is_pinned_within_its_bounds():
  """Once for each Python that the tests run on."""
  project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
  extras = project["optional-dependencies"]
  bounds = [requirements.Requirement(line) for line in (
      *project["dependencies"], *extras["dev"], *extras["parity"])]
  pins = [requirements.Requirement(line) for line in (
      ROOT / "constraints.txt").read_text().splitlines() if line[0] != "#"]
  assert {pin.name for pin in pins} == {bound.name for bound in bounds}
  for bound in bounds:
    for python in PYTHONS:
      [version] = [
          next(iter(pin.specifier)).version for pin in pins
          if pin.name == bound.name and (
              pin.marker is None
              or pin.marker.evaluate({"python_version": python}))]
      assert version in bound.specifier, bound
