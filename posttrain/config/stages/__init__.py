"""Kinds of stages, as a config sees them: their keys and checks, without JAX.

A new kind is a file here, which gives a `SCHEMA`, one of the same name in
`posttrain/stages`, which gives a `STAGE`, and its name in `KINDS`. A kind of
one's own is `kind="file.py:STAGE"`, without a change in `posttrain/`.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from posttrain.config.keys import Section

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
  """

  keys: Section
  checks: tuple[Check, ...] = ()
  trains: bool = False
  samples: bool = False
  fits_tokenizer: bool = False
