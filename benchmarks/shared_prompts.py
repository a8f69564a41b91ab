"""`python -m benchmarks.shared_prompts`: training on one prompt per group.

A GRPO update on full groups: each completion with its own copy of the prompt,
against a group that shares one copy, in turns. A row holds a group.
Microbatches have as many tokens either way, or one row. A line of JSON for each
length.
"""

import argparse
import json
from collections.abc import Callable

import jax
import numpy as np

from benchmarks import ours, shapes, sides
from posttrain import distributed, sharding
from posttrain.rl import packing
from posttrain.sampler.rollouts import Rollouts

MICROBATCH_TOKENS = 3072


def parse(argv: list[str] | None = None) -> argparse.Namespace:
  parser = argparse.ArgumentParser(
      prog="python -m benchmarks.shared_prompts", description=__doc__,
      formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument(
      "--prompt", type=int, nargs="+", default=[64, 512, 2048],
      help="tokens of each prompt")
  parser.add_argument("--groups", type=int, default=2)
  parser.add_argument("--samples", type=int, default=8, help="of each prompt")
  parser.add_argument("--new", type=int, default=128,
                      help="tokens of each completion")
  sides.add_arguments(parser)
  return parser.parse_args(argv)


def rollouts(
    config, *, groups: int, samples: int, prompt: int, new: int) -> Rollouts:
  """Makes groups of full completions, of random tokens."""
  count = groups * samples
  of_group = np.repeat(np.arange(groups), samples)
  prompts = shapes.tokens(groups, prompt, config.vocab_size)
  full, zeros = np.full(count, new, np.int32), np.zeros(count, np.int32)
  return Rollouts(
      prompts=[prompts[n] for n in of_group],
      tokens=np.array(
          shapes.tokens(count, new, config.vocab_size, seed=1), np.int32),
      logprobs=np.zeros((count, new)),
      provenance=np.ones((count, new), np.int8), lengths=full,
      finish_reason=zeros, think_end=zeros, think_lengths=zeros,
      think_steps=zeros, answer_lengths=full, wait_count=zeros,
      prompt_id=of_group.astype(np.int32), sample_id=zeros,
      in_thinking=zeros, raw=np.zeros((count, 0)),
      num_turns=zeros + 1, stop_reason=zeros)


def make_side(
    update: Callable, state, drawn: Rollouts, *, length: int, share: bool,
) -> tuple[Callable[[], int], int]:
  """Makes one update on copies of the state; returns the tokens in its rows
  too.
  """
  count = len(drawn.lengths)
  experience = ours.pack(
      drawn, np.random.default_rng(0).normal(size=count).astype(np.float32),
      packing.Shapes(
          length=length, rows=max(1, MICROBATCH_TOKENS // length),
          num_minibatches=1, completions=count, share_prompts=share))
  arrays, used = packing.minibatch(experience, 0)

  def run() -> int:
    _, metrics = jax.block_until_ready(update(
        jax.tree.map(jax.numpy.copy, state), arrays, np.int32(used)))
    return int(metrics["denominator/policy"])

  return run, int((experience["segment_ids"] > 0).sum())


def compare(arguments: argparse.Namespace, prompt: int) -> dict:
  """Measures seconds of an update either way, and the tokens that it computes.
  """
  config = ours.model_config(shapes.SIZES[arguments.size])
  groups, samples, new = arguments.groups, arguments.samples, arguments.new
  drawn = rollouts(
      config, groups=groups, samples=samples, prompt=prompt, new=new)
  state, update = ours.trainer(ours.random_model(config), ours.policy_loss())
  apart, tokens_apart = make_side(
      update, state, drawn, length=prompt + new, share=False)
  shared, tokens_shared = make_side(
      update, state, drawn, length=ours.group_length(prompt, samples, new),
      share=True)
  found = sides.take(
      {"apart": apart, "shared": shared}, groups * samples * new,
      repeats=arguments.repeats, locks=arguments.lock)
  return {
      "benchmark": "shared_prompts", "size": arguments.size, "prompt": prompt,
      "groups": groups, "samples": samples, "new": new,
      "apart_tokens": tokens_apart, "shared_tokens": tokens_shared,
      **{f"{name}_{clock}_seconds": found[name][clock]
         for name in found for clock in ("wall", "cpu")},
      **{f"ratio_{clock}": found["apart"][clock] / found["shared"][clock]
         for clock in ("wall", "cpu")}}


def main(argv: list[str] | None = None) -> None:
  arguments = parse(argv)
  distributed.initialize(cpu_devices=1)
  with jax.set_mesh(sharding.make_mesh()):
    for prompt in arguments.prompt:
      print(json.dumps(compare(arguments, prompt)), flush=True)


if __name__ == "__main__":
  main()
