"""Kinds of stages, as a config sees them: their keys and checks, without JAX.

A new kind is a file here, which gives a `SCHEMA`, one of the same name in
`posttrain/stages`, which gives a `STAGE`, and its name in `KINDS`. A kind of
one's own is `kind="file.py:STAGE"`, without a change in `posttrain/`.
"""

import dataclasses
import importlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from posttrain.config.keys import Section, hint, shown
from posttrain.tasks import loading

KINDS = ("sft", "rl", "evaluate")

# (whole config, name of the stage, its section) -> problems, each of which
# begins with a path inside the section.
Check = Callable[[Mapping[str, Any], str, Mapping[str, Any]], Iterator[str]]


@dataclasses.dataclass(frozen=True)
class StageSchema:
  """Keys and checks of one kind of stage, and what other checks ask of it.

  Attributes:
    keys: the section's keys, without `kind`.
    checks: conditions between keys.
    trains: it updates weights, from which the next stage starts.
    samples: it has a section `rollout`, and draws completions.
    fits_tokenizer: as the first stage it may start from weights that were
      trained with another tokenizer or chat template.
    holds_reference: (section) -> it keeps frozen weights of another model,
      which `reference` names.
    formerly: names that the kind had in older configs.
  """

  keys: Section
  checks: tuple[Check, ...] = ()
  trains: bool = False
  samples: bool = False
  fits_tokenizer: bool = False
  holds_reference: Callable[[Mapping[str, Any]], bool] = lambda section: False
  formerly: tuple[str, ...] = ()

  @property
  def learns_from_rollouts(self) -> bool:
    """It trains on its own completions, maybe of other devices (roles)."""
    return self.trains and self.samples


def schema_of(kind: str) -> StageSchema:
  """Finds the schema of a kind of stage.

  Args:
    kind: one of `KINDS`, or `file.py:STAGE` or `module:STAGE` of one's own.

  Raises:
    ValueError: there is no such kind, or what it names is none.
  """
  if kind in KINDS:
    return importlib.import_module(f"{__name__}.{kind}").SCHEMA
  if isinstance(kind, str) and ":" in kind:
    return _own(kind)
  for name in KINDS:
    if kind in schema_of(name).formerly:
      raise ValueError(f"found {kind!r}, which is called {name!r} now.")
  near = hint(shown(kind)[1:-1], KINDS, "; the nearest is {}")
  raise ValueError(
      f"{shown(kind)} is no kind of stage, needed one of {', '.join(KINDS)}"
      f"{near}. A kind of your own is written file.py:STAGE.")


def _own(kind: str) -> StageSchema:
  try:
    stage = loading.load(kind, "Stage")
  except Exception as error:
    if isinstance(error, ValueError) and str(error).startswith(repr(kind)):
      raise  # Of `loading`; any other is of the file's own code.
    raise ValueError(
        f"{kind!r} cannot be imported: {type(error).__name__}: {error}."
    ) from error
  schema = getattr(stage, "schema", None)
  if not isinstance(schema, StageSchema):
    raise ValueError(
        f"{kind!r} is a {type(stage).__name__}, needed a Stage of "
        "posttrain.stages.stage, whose `schema` is a StageSchema.")
  return schema
