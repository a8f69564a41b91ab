"""Facts that results depend on: files of another start agree, or are ignored.

Two versions of a grader must not be mixed in one result, so the code of this
package is one of them.
"""

import functools
import hashlib
import pathlib
from typing import Any

from posttrain import config as config_lib
from posttrain.stages.run_context import RunContext
from posttrain.tasks import loading


def of_results(context: RunContext) -> dict[str, Any]:
  """Lists what a stage's results are made with, besides weights; JSON."""
  return {
      "seed": context.config.seed,
      "section": config_lib.jsonable(context.section), "code": _code(),
      "sources": {name: loading.source_hash(name)
                  for name in config_lib.functions(context.config)}}


@functools.cache
def _code() -> str:
  """A hash of this package."""
  package = pathlib.Path(config_lib.__file__).parents[1]
  found = hashlib.sha256()
  for file in sorted(package.rglob("*.py")):
    found.update(file.read_bytes())
  return found.hexdigest()
