"""Padding for the lengths in the data, where the data is on this machine."""

import dataclasses
from collections.abc import Mapping

from posttrain import sharding
from posttrain.plan.program import SAMPLING, TRAINING
from posttrain.plan.setup import Setup
from posttrain.stages import sft
from posttrain.tasks import loading
from posttrain.text import render

SAMPLED_PROMPTS = 1000


@dataclasses.dataclass(frozen=True)
class Padding:
  """Padding that one stage computes.

  Attributes:
    share: of the positions; None where it is unknown.
    text: where it comes from, or why it is not known.
  """

  stage: str
  what: str
  share: float | None
  text: str


def of_config(
    setup: Setup, meshes: Mapping[str, sharding.MeshSizes],
) -> list[Padding]:
  """Measures the padding of every training stage on its role's mesh."""
  found, training = [], meshes[TRAINING]
  sampling = meshes.get(SAMPLING, training)
  for name in setup.config.stages:
    section = setup.config[name]
    measures = {"sft": (_rows, training.batch),
                "rl": (_prompts, sampling.rows)}
    if section.kind not in measures:
      continue
    measure, parts = measures[section.kind]
    what = "packed rows" if section.kind == "sft" else "prompts"
    if setup.tokenizer is None:
      found.append(Padding(
          name, what, None, "unknown: the tokenizer is not here"))
      continue
    renderer = render.make_renderer(
        setup.tokenizer, setup.config.chat_template)
    try:
      share, text = measure(setup, name, renderer, parts)
      found.append(Padding(name, what, share, text))
    except (ValueError, OSError) as error:
      found.append(Padding(name, what, None, f"unknown: {error}"))
    if section.kind == "rl":
      found.append(Padding(
          name, "completions", None,
          "unknown before the run: it is the policy that decides lengths"))
  return found


def _rows(
    setup: Setup, name: str, renderer: render.Renderer, parts: int,
) -> tuple[float, str]:
  """Packs the real data, as the stage would."""
  section = setup.config[name]
  batches, _ = sft.read_data(
      section, renderer, seed=setup.config.seed, stage=name)
  share = batches.report["padding_share"]
  multiple = section.num_microbatches * parts
  rows = -(-section.rows // multiple) * multiple
  text = f"{share:.1%} in the {section.rows} rows of the config's data"
  if rows > section.rows:
    text += f", and {rows - section.rows} empty rows for a mesh of {parts}"
  return 1 - (1 - share) * section.rows / rows, text


def _prompts(
    setup: Setup, name: str, renderer: render.Renderer, parts: int,
) -> tuple[float, str]:
  """The task's first prompts against the room for them."""
  section = setup.config[name]
  problems = loading.load_function(section.problems.task)(
      section.problems.split, **section.problems.args)
  count = min(len(problems), SAMPLED_PROMPTS)
  lengths = [len(renderer.prompt_tokens(problems[i])) for i in range(count)]
  room = section.rollout.max_prompt_tokens
  filled = -(-section.num_groups // parts) * parts
  mean = sum(lengths) / count
  return 1 - mean / room * section.num_groups / filled, (
      f"mean {mean:.1f}, longest {max(lengths)} of {room} tokens in "
      f"{count} prompts; {filled - section.num_groups} empty prompts for a "
      f"mesh of {parts}")
