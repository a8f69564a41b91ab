"""What tests with several processes share."""

import socket

import pytest


@pytest.fixture
def free_port() -> int:
  with socket.socket() as probe:
    probe.bind(("localhost", 0))
    return probe.getsockname()[1]
