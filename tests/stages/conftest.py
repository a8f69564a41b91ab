"""Programs that several runs share are compiled once."""

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache


@pytest.fixture(scope="package", autouse=True)
def compiled_once(tmp_path_factory):
  """In this process, and in children that get its environment."""
  directory = str(tmp_path_factory.mktemp("compiled"))
  # Seconds. What compiles faster is hardly read faster.
  settings = dict(jax_compilation_cache_dir=directory,
                  jax_persistent_cache_min_compile_time_secs=0.05)
  before = {name: getattr(jax.config, name) for name in settings}
  with pytest.MonkeyPatch.context() as patch:
    for name, value in settings.items():
      jax.config.update(name, value)
      patch.setenv(name.upper(), str(value))
    yield
  for name, value in before.items():
    jax.config.update(name, value)
  compilation_cache.reset_cache()
