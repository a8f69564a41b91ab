"""Programs that several runs share are compiled once."""

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache


@pytest.fixture(scope="package", autouse=True)
def compiled_once(tmp_path_factory):
  """In this process, and in children that get its environment."""
  directory = str(tmp_path_factory.mktemp("compiled"))
  before = jax.config.jax_compilation_cache_dir
  jax.config.update("jax_compilation_cache_dir", directory)
  with pytest.MonkeyPatch.context() as patch:
    patch.setenv("JAX_COMPILATION_CACHE_DIR", directory)
    yield
  jax.config.update("jax_compilation_cache_dir", before)
  compilation_cache.reset_cache()
