"""What a GRPO section names: shapes, the loss, what draws and scores."""

from ml_collections import config_dict

from posttrain import sharding
from posttrain.stages import rollout, sampling
from posttrain.stages.context import StageContext
from posttrain.tasks import loading
from posttrain.train import policy


def num_updates(section: config_dict.ConfigDict) -> int:
  """Optimizer updates from one batch of rollouts."""
  return section.num_minibatches * section.num_epochs


def make_shapes(section: config_dict.ConfigDict) -> policy.Shapes:
  """How completions are packed, on the current mesh."""
  return policy.Shapes(
      length=section.sequence_length,
      rows=_round_up(section.rows_per_microbatch),
      num_minibatches=section.num_minibatches,
      completions=-(-section.num_groups // section.num_minibatches)
      * section.group_size,
      share_prompts=section.share_prompts)


def make_loss(
    section: config_dict.ConfigDict, *, loss_chunk: int,
) -> policy.PolicyLoss:
  """The loss that the section names."""
  loss = section.loss
  return policy.PolicyLoss(
      function=loading.load_function(loss.function),
      temperature=section.rollout.temperature, chunk=loss_chunk,
      clip_low=loss.clip_low, clip_high=loss.clip_high,
      kl_coef=loss.kl_coef if loss.kl_in == "loss" else 0.0,
      kl_estimator=loss.kl_estimator,
      correction=loss.behaviour_correction, cap=loss.behaviour_cap,
      floor=loss.behaviour_floor)


def make_collector(context: StageContext) -> rollout.Collector:
  """The task, the rewards and the sampler that the section names."""
  section = context.section
  problems = loading.load_function(section.problems.task)(
      section.problems.split, **section.problems.args)
  rewards = {
      name.rpartition(":")[2]: loading.load_function(name)
      for name in section.rewards}
  if len(rewards) < len(section.rewards):
    raise ValueError(
        f"{context.name}.rewards has two functions of one name: "
        f"{', '.join(section.rewards)}. Metrics are named by it; rename one.")
  return rollout.Collector(
      sampler=sampling.make_sampler(context, section.rollout),
      limits=sampling.make_limits(section.rollout),
      renderer=context.renderer, problems=problems, rewards=rewards,
      weights=section.reward_weights or (1.0,) * len(rewards),
      num_groups=section.num_groups, group_size=section.group_size,
      seed=context.config.seed, stage=context.name)


def _round_up(rows: int) -> int:
  """To what the mesh divides; the added rows are padding."""
  parts = sharding.axis_size("batch")
  return -(-rows // parts) * parts
