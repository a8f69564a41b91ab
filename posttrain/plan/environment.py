"""Environment variables that let JAX compile for a TPU; set before its import.

A plan runs on a machine without one: JAX itself stays on the CPU, and libtpu
is asked for nothing but its compiler. No JAX here.
"""

import importlib.util
import os

VARIABLES = {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",  # Never asks the cloud's metadata server.
    # The next three keep libtpu from looking for, and complaining about, a
    # machine that it is not on. They do not have to match the topology.
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # Several plans may run at once.
}


class PlanError(ValueError):
  """A plan that cannot be made as it was asked for; the message says why."""


def prepare() -> None:
  """Sets the variables."""
  os.environ.update(VARIABLES)


def check() -> None:
  """Raises PlanError if libtpu is not installed."""
  if importlib.util.find_spec("libtpu") is None:
    raise PlanError(
        "libtpu, the compiler for TPUs, is not installed. Run "
        "`pip install 'posttrain[plan]'`, or `make plan-deps` in a checkout.")
