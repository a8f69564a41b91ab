"""Padding for the lengths in the data, where the data is on this machine."""

import dataclasses
from collections.abc import Mapping

from posttrain import sharding
from posttrain.plan import programs
from posttrain.stages.planned_stage import Setup
from posttrain.text import render


@dataclasses.dataclass(frozen=True)
class Padding:
  """Padding that one stage computes.

  Attributes:
    what: rows or tokens that are padded.
    share: of the positions; None where it is unknown.
    text: the source of the figure, or why it is not known.
  """

  stage: str
  what: str
  share: float | None
  text: str


def of_config(
    setup: Setup, meshes: Mapping[str, sharding.MeshSizes],
) -> list[Padding]:
  """Measures the padding of every stage that has some, on its role's mesh."""
  found = []
  for stage, record in programs.planned(setup):
    for what, measure in record.padding.items():
      try:
        if setup.tokenizer is None:
          raise ValueError("the tokenizer is not here")
        renderer = render.make_renderer(
            setup.tokenizer, setup.config.chat_template)
        share, text = measure(stage, renderer, meshes)
        found.append(Padding(stage.name, what, share, text))
      except (ValueError, OSError) as error:
        found.append(Padding(stage.name, what, None, f"unknown: {error}"))
  return found
