"""What a stage will need of a device's memory, before anything is compiled.

From its section and the model's shape alone: where weights do not fit, it is
said before they are made.
"""

from ml_collections import config_dict

from posttrain import sharding
from posttrain.model.config import ModelConfig
from posttrain.stages.context import StageContext
from posttrain.train import memory


def of_stage(context: StageContext, model: ModelConfig) -> memory.Estimate:
  """The estimate for the stage of `context`, on the current mesh."""
  section, compute = context.section, context.config.compute
  sizes = {}
  if section.kind == "sft":
    sizes = dict(rows=-(-section.rows // section.num_microbatches),
                 sequence_length=section.sequence_length)
  if section.kind == "grpo":
    sizes = dict(
        rows=section.rows_per_microbatch,
        sequence_length=section.sequence_length,
        frozen_copies=int(section.loss.kl_coef > 0),
        frozen_dtype=compute.frozen_dtype,
        cache_rows=section.num_groups * section.group_size)
  if section.kind == "evaluate":
    samples = max(section.samples_per_problem, section.majority.max_samples)
    sizes = dict(cache_rows=max(section.rollout.batch_rows, samples))
  if "cache_rows" in sizes:
    sizes["cache_slots"] = cache_slots(section.rollout)
  return memory.estimate(
      model, **sharding.mesh_sizes(), loss_chunk=compute.loss_chunk,
      **sizes)


def cache_slots(rollout: config_dict.ConfigDict) -> int:
  """Of the cache at its largest: a chunk behind the prompt, and doubled.

  Tokens that are taken back for a wait need slots too, and are not counted.
  """
  slots = rollout.chunk
  while slots < rollout.max_tokens:
    slots *= 2
  return rollout.max_prompt_tokens + slots
