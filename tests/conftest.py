"""Every test process sees eight CPU devices unless told otherwise."""

import os
import socket

import hypothesis
import pytest

# A machine that is busy with other work is no failure of a property.
hypothesis.settings.register_profile("posttrain", deadline=None)
hypothesis.settings.load_profile("posttrain")

if os.environ.get("POSTTRAIN_TEST_PLATFORM", "cpu") == "cpu":
  os.environ["JAX_PLATFORMS"] = "cpu"
  flags = os.environ.get("XLA_FLAGS", "")
  if "xla_force_host_platform_device_count" not in flags:
    os.environ["XLA_FLAGS"] = (
        flags + " --xla_force_host_platform_device_count=8").strip()
    # As `distributed.spare_threads` has it; that would import JAX here.
    os.environ.setdefault("PJRT_NPROC", str((os.cpu_count() or 1) + 16))


@pytest.fixture
def free_port() -> int:
  """For processes that find each other on this machine."""
  with socket.socket() as probe:
    probe.bind(("localhost", 0))
    return probe.getsockname()[1]
