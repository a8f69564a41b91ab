"""Programs that several runs share are compiled once, as for the stages."""

from tests.stages.conftest import compiled_once

__all__ = ["compiled_once"]
