import pytest

from tests.launch import clouds


@pytest.fixture
def cloud(tmp_path, monkeypatch):
  return clouds.Cloud(tmp_path / "cloud", monkeypatch)
