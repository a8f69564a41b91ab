"""Oracle: the same completions, each behind a prompt of its own."""

import dataclasses

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from posttrain import sharding
from posttrain.data import pack
from posttrain.rl import experience as experience_lib
from posttrain.rl import packing, shared_prompts
from tests import meshes
from tests.model import build
from tests.rl import test_packing as alone


@given(st.data())
def test_every_member_sees_its_prompt_and_itself(data):
  """And no piece is longer than a row, nor is a prompt there without need."""
  length = data.draw(st.integers(8, 40))
  kinds = data.draw(st.lists(
      st.lists(st.integers(0, 9), min_size=1, max_size=length - 1),
      min_size=1, max_size=3))
  prompts = data.draw(st.lists(st.sampled_from(kinds), min_size=1, max_size=9))
  sizes = [data.draw(st.integers(1, length - len(p))) for p in prompts]
  sequences = [
      prompt + [100 + n] * size
      for n, (prompt, size) in enumerate(zip(prompts, sizes, strict=True))]
  pieces = shared_prompts.merge(
      [{"tokens": np.array(tokens)} for tokens in sequences], prompts,
      length=length)
  arrays = shared_prompts.separate(pack.pack_rows(pieces, length=length)[0])
  found = []
  for row in range(len(arrays["tokens"])):
    tokens, positions, segment, prefix = (
        arrays[name][row] for name in (
            "tokens", "positions", "segment_ids", "prefix_ids"))
    for one in set(segment[segment > prefix]):
      seen = (segment == one) | (segment == prefix[segment == one][0])
      assert positions[seen].tolist() == list(range(seen.sum()))
      found.append(tokens[seen].tolist())
  assert sorted(found) == sorted(sequences)
  used = int((arrays["segment_ids"] > 0).sum())
  members = sum(1 + size for size in sizes)
  least = members + sum(len(p) - 1 for p in {tuple(p): p for p in prompts}
                        .values())
  most = members + sum(len(p) - 1 for p in prompts)
  assert least <= used <= most
  if members + max(map(len, prompts)) - 1 <= length:
    assert used == least


@pytest.mark.parametrize("option, mesh, fields", [
    ("gemma", meshes.one, {}),
    ("everything", meshes.with_context, dict(
        attention="blocks", attention_block=5)),
    pytest.param("experts", meshes.eight, {}, marks=pytest.mark.slow),
    pytest.param("gemma", meshes.eight, dict(
        attention="blocks", attention_block=7, remat="dots"),
                 marks=pytest.mark.slow)])
def test_logprobs_are_those_of_completions_apart(option, mesh, fields):
  """Windows, biases, adapters and all; rows and lengths split or not."""
  config = build.make_config(**build.OPTIONS[option], **fields)
  with jax.set_mesh(mesh()):
    model = build.load(config, build.random_params(config))
    logprobs = []
    for share in (False, True):
      experience = experience_lib.add_logprobs(
          "old_logprobs", model, packed(share, config), **alone.OPTIONS)
      logprobs.append(by_token(experience))
  assert logprobs[0].keys() == logprobs[1].keys()
  for place, wanted in logprobs[0].items():
    assert logprobs[1][place] == pytest.approx(wanted, abs=2e-5), place


def packed(share: bool, config) -> packing.Arrays:
  rollouts = alone.ROLLOUTS
  if config.num_experts:
    rollouts = dataclasses.replace(rollouts, experts=np.zeros(
        (*rollouts.tokens.shape, config.layers, config.experts_per_token),
        np.int8))
  return packing.pack_experience(
      rollouts, alone.GROUPS, alone.MINIBATCHES, packing.Shapes(
          length=alone.LENGTH, rows=sharding.axis_size("batch") * 2,
          num_minibatches=2, completions=7, share_prompts=share))


def by_token(experience: packing.Arrays) -> dict[tuple[int, int], float]:
  """Logprobs by completion and position of the tokens in the loss."""
  at = experience["loss_mask"]
  keys = zip(experience["completion_ids"][at].tolist(),
             experience["positions"][at].tolist(), strict=True)
  return dict(zip(keys, experience["old_logprobs"][at].tolist(), strict=True))
