"""Oracle: what a real engine calls, on eight devices of a CPU."""

import collections
import contextlib
import dataclasses
import pathlib
import re

import jax
import numpy as np
import pytest

from posttrain import config as config_lib
from posttrain import sharding
from posttrain.model import transformer
from posttrain.plan import programs
from posttrain.programs import engine as engine_programs
from posttrain.programs import program as program_lib
from posttrain.sampler import device_batch, logits_processors
from posttrain.sampler import sampler as sampler_lib
from posttrain.stages import sampling
from posttrain.text import symbols
from tests import meshes

GOLDEN = pathlib.Path(__file__).parent / "golden_config.py"
LIMITS = sampler_lib.Limits(max_tokens=20)


def small_setup(*, episode="", **rollout):
  config = config_lib.read_file(str(GOLDEN))
  if episode:
    config.reason.update(episode=episode, sequence_length=64)
  config.model_overrides.update(layers=2, embed=64, mlp=96, head_dim=16)
  config.mesh.update(fsdp=4, tensor=2)
  config.compute.update(dtype="float32", remat="none")
  config.reason.rollout.update(max_tokens=20, chunk=4, **rollout)
  return programs.set_up(config_lib.resolve(config))


def planned(found, groups, group_size):
  """Name -> its program, of one call of the sampler."""
  rollout = found.config.reason.rollout
  model = program_lib.model_of(found.model)
  return {program.name: program for program in engine_programs.of_rollout(
      "reason", found.sampler(rollout), model, groups=groups,
      group_size=group_size, limits=LIMITS, beside={})}


@contextlib.contextmanager
def watched(monkeypatch):
  """Calls and bytes of arguments by the name that the plan gives a program."""
  calls, held = collections.Counter(), collections.defaultdict(set)
  original = device_batch.Programs.__call__

  def call(self, key, function, *args, **kwargs):
    kind, *numbers = key
    if kind == "place":
      into, size, rows, source = numbers
      # Of 8 rows that decode, and 4 that are prefilled.
      kind = {8: "place", 4: "prefix" if rows == 4 else "keep"}[into]
      detail = f"[rows={rows} S={source} to {size}]"
    else:
      detail = {"empty": "[rows={} S={}]", "prefill": "[rows={} S={}]",
                "resize": "[S={} to {}]", "decode": "[S={}]"}.get(
                    kind, "").format(*numbers)
    name = f"reason/{kind}{detail}"
    calls[name] += 1
    held[name].add(program_lib.shard_bytes([
        x for x in jax.tree.leaves((args, kwargs))
        if isinstance(x, jax.Array)]))
    return original(self, key, function, *args, **kwargs)

  monkeypatch.setattr(device_batch.Programs, "__call__", call)
  yield calls, held


def generate(found, prompts, group_size, script=None):
  sampler = sampling.of_tables(
      found.tables, found.config.reason.rollout)
  model = transformer.Transformer(found.model, jax.random.key(0))
  return sampler.generate(
      model, prompts, LIMITS, prompt_id=range(len(prompts)),
      group_size=group_size, seed=0, stage="reason", script=script)


# Of groups that do and do not divide the slots, and of single samples.
@pytest.mark.parametrize("groups, group_size, slots, window", [
    (4, 4, 8, 0), (7, 3, 8, 0), (13, 1, 8, 16)])
def test_calls_are_those_of_the_longest_rows(
    groups, group_size, slots, window, monkeypatch):
  meshes.eight()  # Or skips.
  monkeypatch.setattr(sampler_lib, "PREFILL_CHUNK", 8)
  found = small_setup(max_num_seqs=slots, confidence_window=window)
  prompts = [[3 + n] * 16 for n in range(groups)]
  script = np.full((groups * group_size, 24), 7, np.int32)  # No end of text.
  with jax.set_mesh(sharding.make_mesh(4, 2)), watched(monkeypatch) as real:
    expected = planned(found, groups, group_size)
    rollouts = generate(found, prompts, group_size, script)
  assert (rollouts.lengths == 20).all()
  calls, held = real
  assert expected.pop("reason/unstack").calls == 1  # Not by the engine's run.
  assert calls == {
      name: program.calls for name, program in expected.items()
      if program.calls}
  for name, sizes in held.items():
    assert sizes == {program_lib.shard_bytes(expected[name].arguments)}, name
  # Others are for shorter rows and for prompts that share a beginning.
  assert {re.sub(r"\W.*", "", name.split("/")[1])
          for name in set(expected) - set(calls)} <= {
              "empty", "prefill", "place", "prefix", "resize"}


def test_no_program_runs_that_was_not_planned(monkeypatch):
  """Prompts of any length, a prefix that they share, and rows that end."""
  meshes.eight()
  monkeypatch.setattr(sampler_lib, "PREFILL_CHUNK", 4)
  found = small_setup(max_num_seqs=8)
  rng = np.random.default_rng(0)
  lengths = (16, 5, 9, 13, 6, 7, 16, 11, 10)
  prompts = [[5, 6, 7, 8, *rng.integers(9, 30, n - 4)] for n in lengths]
  with jax.set_mesh(sharding.make_mesh(4, 2)), watched(monkeypatch) as real:
    expected = planned(found, len(prompts), 2)
    script = np.full((2 * len(prompts), 24), 7, np.int32)
    for row, end in enumerate(rng.integers(1, 24, len(script))):
      script[row, end] = found.tokenizer.stop_ids[0]
    rollouts = generate(found, prompts, 2, script)
  calls, _ = real
  assert len(set(rollouts.lengths.tolist())) > 5
  assert any(name.startswith("reason/prefix") for name in calls)
  assert set(calls) <= set(expected)


def test_programs_of_turns_are_planned(monkeypatch):
  """Two turns of each row, of any length, the second behind an observation."""
  meshes.eight()
  monkeypatch.setattr(sampler_lib, "PREFILL_CHUNK", 8)
  found = small_setup(
      max_num_seqs=8, max_episode_tokens=40,
      episode="posttrain.episodes.calculator:calculator")
  rng = np.random.default_rng(0)
  with jax.set_mesh(sharding.make_mesh(4, 2)), watched(monkeypatch) as real:
    expected = planned(found, 6, 2)
    sampler = sampling.of_tables(
        found.tables, found.config.reason.rollout,
        symbols.SymbolTable.of(found.tokenizer))
    prompts = [rng.integers(9, 30, n).tolist() for n in (16, 5, 9, 13, 6, 7)]
    asked = [dataclasses.replace(r, keep=True, max_tokens=int(n))
             for r, n in zip(sampler.make_requests(
                 prompts, LIMITS, prompt_id=range(6), group_size=2),
                 rng.integers(2, 20, 12), strict=True)]
    engine = sampler.make_engine(
        transformer.Transformer(found.model, jax.random.key(0)), asked, 2)
    for request in asked:
      engine.submit(request)
    for done in list(engine.results()):
      engine.submit(dataclasses.replace(
          done.request, prompt=(*done.kept, 9, 10), max_tokens=18,
          first_draw=done.draws))
    assert not any(done.error for done in engine.results())
  calls, held = real
  assert {"reason/keep", "reason/prefix"} <= {
      name.partition("[")[0] for name in calls}
  assert set(calls) <= set(expected)
  for name, sizes in held.items():
    assert sizes == {program_lib.shard_bytes(expected[name].arguments)}, name


def test_a_hook_is_planned(monkeypatch):
  meshes.eight()
  found = small_setup(max_num_seqs=8)
  options = sampling.make_sampling_options
  processor = logits_processors.repetition_penalty(found.tables.vocab_size)
  monkeypatch.setattr(sampling, "make_sampling_options", lambda *args: (
      dataclasses.replace(options(*args), logits_processor=processor)))
  with jax.set_mesh(sharding.make_mesh(4, 2)), watched(monkeypatch) as real:
    expected = planned(found, 3, 4)
    generate(found, [[n] * 16 for n in (4, 5, 6)], 4,
             np.full((12, 24), 7, np.int32))
  calls, held = real
  assert calls["reason/logits_processor"] == (
      expected["reason/logits_processor"].calls) == 12
  for name, sizes in held.items():
    assert sizes == {program_lib.shard_bytes(expected[name].arguments)}, name


def evaluation(count=0, **rollout):
  config = config_lib.read_file(str(GOLDEN))
  config.stages = ("measure",)
  config.measure = dict(
      kind="evaluate", problems=dict(
          task="posttrain.tasks.signs:problems", args=dict(count=100),
          count=count),
      reward="posttrain.tasks.signs:reward", num_waits=(2,),
      rollout=dict(max_prompt_tokens=16, chunk=16,
                   max_num_seqs=8, **{"max_tokens": 32, **rollout}))
  config.thinking = dict(newline="", wait_text="<think>")
  found = programs.set_up(config_lib.resolve(config))
  with jax.set_mesh(meshes.one()):
    return list(programs.of_config(found))


def test_an_evaluation_has_a_ring_for_its_waits():
  """Waits need slots beyond the longest completion."""
  # Of 64 slots the prompt has 16 and the completion 47, its end takes one.
  found = evaluation(max_tokens=47)
  assert not any(program.calls for program in found)
  names = [program.name for program in found]
  # One token for the delimiter, of each wait and of the end.
  assert "measure/decode[waits=0 S=64]" in names
  assert "measure/decode[waits=2 S=96]" in names


@pytest.mark.parametrize("count, rows", [(3, 3), (8, 8), (9, 8), (0, 8)])
def test_no_more_rows_than_completions_are_planned(count, rows):
  """Of eight at most; they are what the memory estimate counts."""
  [decode] = {program.arguments[2].hidden.shape[0]
              for program in evaluation(count=count)
              if program.kind == "decode"}
  assert decode == rows


def test_words_that_are_suppressed_are_in_the_program():
  texts = []
  for words in ((), ("0",)):
    found = evaluation(suppress=words)
    decode = [program for program in found if program.kind == "decode"][-1]
    with jax.set_mesh(meshes.one()):
      texts.append(decode.lower().as_text())
  assert len(texts[1]) > len(texts[0])
