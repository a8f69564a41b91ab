"""Provenance of a run: versions, git commit, machine, function sources."""

import importlib.metadata
import os
import pathlib
import platform
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from typing import Any

import posttrain
from posttrain.tasks import loading

PACKAGES = (
    "jax", "jaxlib", "libtpu", "flax", "optax",
    "orbax-checkpoint", "grain", "numpy", "ml_collections", "sentencepiece",
    "tokenizers", "jinja2", "math-verify")


def environment(
    functions: Iterable[str], devices: Sequence[str],
) -> dict[str, Any]:
  """Records what the numbers of a run depend on besides its config.

  Args:
    functions: names (`module:function`) of tasks, rewards and the like.
    devices: descriptions of the devices that the run computes on.
  """
  return dict(
      time=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
      command=sys.argv,
      python=platform.python_version(),
      platform=platform.platform(),
      # XLA splits sums on CPUs by the cores that it may use, so the last bits
      # depend on them.
      cores=len(os.sched_getaffinity(0)) if hasattr(
          os, "sched_getaffinity") else os.cpu_count(),
      versions={"posttrain": posttrain.__version__} | {
          name: version for name in PACKAGES
          if (version := _version(name)) is not None},
      git=_git(),
      devices=list(devices),
      sources={name: loading.source_hash(name)
               for name in functions},
  )


def _version(package: str) -> str | None:
  try:
    return importlib.metadata.version(package)
  except importlib.metadata.PackageNotFoundError:
    return None


def _git() -> dict[str, Any]:
  """Reads the commit of the source tree, and the tracked files that differ."""
  here = pathlib.Path(__file__).parent
  ask = lambda *args: subprocess.run(
      ["git", "-C", here, *args], capture_output=True, text=True, check=True,
  ).stdout
  try:
    changed = ask("status", "--porcelain", "--untracked-files=no")
    return dict(
        commit=ask("rev-parse", "HEAD").strip(),
        changed=[line[3:] for line in changed.splitlines()])
  except (OSError, subprocess.CalledProcessError):
    return dict(commit=None, changed=[])  # Installed without its repository.
