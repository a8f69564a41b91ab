"""The configs for pods say what the papers say, and what they add is right.

Their `:debug` variants run in test_debug.py; their plans are in docs/pods.md.
"""

import math

import pyarrow
import pyarrow.parquet
import pytest

from posttrain import config as config_lib
from posttrain.tasks import loading

DEBUG = ["s1", "r1_zero", "mixture", "distill_70b"]
FULL = ["s1.py", "r1_zero.py", "r1_zero.py:32b", "mixture.py",
        "distill_70b.py", "distill_70b.py:4k"]


def load(name):
  return config_lib.load(f"configs/{name}")


@pytest.mark.parametrize("name", [f"{name}.py:debug" for name in DEBUG])
def test_a_debug_variant_has_the_same_stages(name):
  """And every setting of memory and precision, but for a TPU's kernel."""
  debug, full = load(name), load(name.partition(":")[0])
  assert debug.stages == full.stages
  assert full.compute.attention == "splash"
  assert {**full.compute, "attention": "blocks"} == {**debug.compute}
  for stage in debug.stages:
    for key in ("kind", "optimizer", "moments_dtype", "loss", "learning_rate"):
      assert debug[stage].get(key) == full[stage].get(key)


@pytest.mark.parametrize("name", FULL)
def test_tokens_of_a_step(name):
  """All of them are of the published sizes, in bfloat16, recomputed."""
  config = load(name)
  assert config.init.kind == "preset"
  assert (config.compute.dtype, config.compute.remat) == ("bfloat16", "full")
  [stage] = config.stages
  section = config[stage]
  tokens = section.get("rows", 0) * section.sequence_length or (
      section.num_groups * section.group_size
      * section.rollout.max_tokens)
  assert tokens == {
      "s1.py": 16 * 32_768, "r1_zero.py": 512 * 16_384,
      "r1_zero.py:32b": 512 * 16_384, "mixture.py": 1024 * 8192,
      "distill_70b.py": 64 * 32_768, "distill_70b.py:4k": 64 * 32_768}[name]


def test_s1s_numbers():
  """Five epochs of 1,000 examples, 16 a step; 5% of warm-up."""
  think = load("s1.py").think
  assert think.num_steps == 5 * math.ceil(1000 / 16) == 315
  assert think.warmup_steps == math.ceil(0.05 * 315)
  assert (think.beta1, think.beta2, think.weight_decay) == (0.9, 0.95, 1e-4)
  assert (think.learning_rate, think.final_learning_rate) == (1e-5, 0)
  assert not think.data.packing and think.schedule == "cosine"


def test_s1s_format(tmp_path):
  path = str(tmp_path / "train.parquet")
  pyarrow.parquet.write_table(pyarrow.Table.from_pylist([
      dict(question="2+2?", thinking_trajectories=["a\n", " b"], attempt="4"),
      dict(question="3?", thinking_trajectories=["c"], attempt="Answer: 3")]),
      path)
  make = loading.load_function("configs/s1.py:demonstrations")
  first, second = make("train", path=path)
  assert first["prompt"] == "2+2?"
  assert first["completion"] == (
      "<|im_start|>think\na\n\n<|im_start|>think\n b\n"
      "<|im_start|>answer\nAnswer: 4")
  assert second["completion"].endswith("<|im_start|>answer\nAnswer: 3")
  with pytest.raises(ValueError, match="no split 'test'"):
    make("test", path=path)


@pytest.mark.parametrize("text, score", [
    ("<think> a </think> <answer> 4 </answer>", 1),
    ("\n<think>a</think><answer>4</answer>\n", 1),
    ("<think> a </think> <answer> 4", 0),
    ("<answer> 4 </answer> <think> a </think>", 0),
    ("so <think> a </think> <answer> 4 </answer>", 0),
    ("<think> a </think> <think> b </think> <answer> 4 </answer>", 0),
    ("", 0)])
def test_r1_zeros_format(text, score):
  reward = loading.load_function("configs/r1_zero.py:follows_format")
  assert reward("", "4", full_text=text, answer="4") == score
