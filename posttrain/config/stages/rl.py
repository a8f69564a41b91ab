"""Stages of kind `rl`: policy optimisation against verifiable rewards."""

from collections.abc import Iterator, Mapping

from posttrain.config import checks, keys, reader
from posttrain.config.keys import REQUIRED, Key, Needs, Section
from posttrain.config.stages import StageSchema, sampling, training

# Defaults of the loss, which say if a key is set.
FUNCTION = "posttrain.objectives.policy:policy_loss"
CLIP, AGGREGATION, ESTIMATOR = 0.2, "token_mean", "k3"
CORRECTIONS = ("none", "truncate", "mask")

ROLLOUT = Section(
    "Sampling of completions (rollouts), and their thinking budget.",
    **sampling.ROLLOUT,
    temperature=Key(float, 1.0, "Sampling temperature, which the loss's "
                    "logprobs have too.", keys.TEMPERATURES),
    **sampling.BUDGET,
    max_num_seqs=sampling.max_num_seqs(
        0, "[0, inf)", " 0: all completions of a batch."),
    slots=keys.Renamed("rollout.max_num_seqs"),
    **{name: keys.Refused(
        "the policy ratio would be against a truncated distribution; RL "
        "rollouts sample from the whole vocabulary")
       for name in sampling.TRUNCATIONS},
    **{name: keys.Refused(
        "the policy ratio would be against another distribution than the "
        "model's; it is there for evaluation")
       for name in sampling.LOGITS},
)

LOSS = Section(
    "The clipped policy-gradient objective (PPO, GRPO, DAPO, Dr. GRPO).",
    function=Key(str, FUNCTION, "Objective: "
                 "a function of named columns that gives the terms of the "
                 "loss; see docs/changing.md.", function=True),
    args=Key(dict, {}, "Parameters of a loss.function of your own, by name."),
    clip_low=Key(float, CLIP, "Clipping: the policy ratio is kept above 1 - "
                 "clip_low (TRL: epsilon).", "[1e-6, 1]"),
    clip_high=Key(float, CLIP, "Clipping: the policy ratio is kept below 1 + "
                  "clip_high (TRL: epsilon_high). DAPO's clip-higher sets it "
                  "above clip_low.", "[1e-6, 1e6]"),
    aggregation=Key(
        str, AGGREGATION, "Mean over all tokens of the minibatch (token_mean, "
        "DAPO), mean of each completion's mean (sequence_mean, GRPO), or sum "
        "over a constant (Dr. GRPO). Completions without a signal count in all "
        "three.", choices=("token_mean", "sequence_mean", "constant")),
    advantage_std=Key(
        str, "population", "Divisor of the advantages: the standard deviation "
        "of the rewards in the group, of the population or of a sample, or "
        "none (Dr. GRPO).", choices=("population", "sample", "none")),
    advantage_eps=Key(
        float, 1e-6, "Epsilon: added to that standard deviation.", "[0, 1]",
        needs=Needs("loss.advantage_std", "!=", "none")),
    kl_coef=Key(float, 0.0, "KL penalty: weight of the KL divergence from the "
                "reference (TRL: beta). 0: no KL penalty.", "[0, 1000]"),
    kl_estimator=Key(
        str, ESTIMATOR, "Estimator of the KL divergence. k1: the log ratio, "
        "for the reward; k2: half its square; k3: unbiased and positive, as in "
        "GRPO. The loss takes k2 or k3, as the expected gradient of k1 there "
        "is zero.", choices=("k1", "k2", "k3"),
        needs=Needs("loss.kl_coef", ">", 0)),
    kl_in=Key(
        str, "loss", "Place of the KL penalty: in the loss, per token; or in "
        "the reward, where the sum over a completion, centred in its group and "
        "not divided by any deviation, is subtracted from its advantage.",
        choices=("loss", "reward"), needs=Needs("loss.kl_coef", ">", 0)),
    importance_sampling=Key(
        str, "none", "Importance sampling correction for off-policy rollouts, "
        "and for a sampler that computes other logprobs than the trainer: each "
        "token's policy term is weighted by the ratio of the trainer's old "
        "probability to the sampler's. The ratio is truncated at a cap (TIS), "
        "or the token is masked where it is above the cap or below a floor "
        "(IcePop).", choices=CORRECTIONS),
    importance_sampling_cap=Key(
        float, 2.0, "Cap on the importance ratio.", "[1, 1e6]",
        needs=Needs("loss.importance_sampling", "!=", "none")),
    importance_sampling_floor=Key(
        float, 0.5, "Floor of the importance ratio, with masking.", "[0, 1]",
        needs=Needs("loss.importance_sampling", "==", "mask")),
    behaviour_correction=keys.Renamed("loss.importance_sampling"),
    behaviour_cap=keys.Renamed("loss.importance_sampling_cap"),
    behaviour_floor=keys.Renamed("loss.importance_sampling_floor"),
)

KEYS = Section(
    "Reinforcement learning against verifiable rewards. The defaults are GRPO "
    "(group-relative policy optimisation) with DAPO's mean over tokens.",
    num_steps=Key(int, REQUIRED, "Optimizer updates. A batch of rollouts gives "
                  "num_minibatches x num_epochs of them.", "[1, inf)"),
    num_groups=Key(int, REQUIRED, "Prompts per batch of rollouts.", "[1, inf)"),
    group_size=Key(
        int, REQUIRED, "Completions per prompt. They are the group that "
        "advantages are relative to (TRL: num_generations).", "[2, inf)"),
    num_minibatches=Key(
        int, 1, "Updates per epoch over a batch of rollouts.", "[1, inf)"),
    num_epochs=Key(int, 1, "Epochs over a batch of rollouts (TRL: "
                   "num_iterations).", "[1, inf)"),
    sequence_length=Key(
        int, REQUIRED, "Tokens per packed row of the trainer.", "[2, inf)"),
    rows_per_microbatch=Key(
        int, REQUIRED, "Gradient accumulation: packed rows per microbatch, "
        "which is one forward and backward pass, over all devices. A minibatch "
        "takes as many microbatches as it needs.", "[1, inf)"),
    share_prompts=Key(
        bool, False, "In the trainer's rows the completions of a group share "
        "one copy of their prompt. Not with compute.attention='splash'."),
    problems=sampling.problems("train"),
    **sampling.EPISODE,
    rewards=Key(tuple[str, ...], REQUIRED, "Reward functions that score a "
                "completion. Their scores are added up.", function=True),
    reward_weights=Key(tuple[float, ...], (), "Weight of each reward. Unset: "
                       "all 1.", "[-1e6, 1e6]"),
    workers=sampling.WORKERS,
    rollout=ROLLOUT,
    loss=LOSS,
    staleness=Key(
        int, 0, "Asynchronous rollouts: batches that are sampled ahead while "
        "others are trained on. It is their off-policy lag: batch b is sampled "
        "by the policy as it was before the updates of batch b - staleness. "
        "Needs mesh.roles='split'.", "[0, inf)"),
    reference=Key(
        str, "", 'Reference policy of the KL penalty, or of a loss.function '
        'that declares ref_logprobs: an earlier stage, "init" '
        'or a checkpoint\'s directory. "": the weights that this stage starts '
        'from. "adapter_off": the policy without its LoRA adapters. The last '
        "two share with the policy all that it does not train."),
    **training.shared(
        "constant",
        patience=Key(int, 20, "Batches in a row without any signal, or with "
                     "every completion cut off at max_tokens, before the run "
                     "stops.", "[1, inf)"),
        max_unscored=Key(float, 0.25, "Largest share of a batch's completions "
                         "without a score, as a reward timed out or failed on "
                         "them, or none applies. 1: any.", "[0, 1]"),
        unscored_patience=Key(
            int, 3, "Batches in a row with a larger share before the run "
            "stops.", "[1, inf)", needs=Needs("health.max_unscored", "<", 1))),
    save_rollouts_every=Key(
        int, 10, "Steps between saved rollouts (JSONL). 0: none.", "[0, inf)"),
    show_sample_every=Key(
        int, 10, "Steps between samples on the console. 0: none.", "[0, inf)"),
)


def check_groups(config, name: str, stage: Mapping) -> Iterator[str]:
  yield from training.divides(stage, "num_minibatches", "num_groups")
  updates = stage["num_minibatches"] * stage["num_epochs"]
  if stage["num_steps"] % updates:
    yield (f"num_steps: {stage['num_steps']} is not a multiple of the "
           f"{updates} updates (num_minibatches x num_epochs) that a batch of "
           "rollouts gives.")
  rollout = stage["rollout"]
  longest = sampling.longest(rollout)
  if stage["sequence_length"] < longest:
    key = ("max_episode_tokens" if rollout["max_episode_tokens"]
           else "max_tokens")
    yield (f"sequence_length: {stage['sequence_length']} does not hold "
           f"rollout.max_prompt_tokens + rollout.{key} = {longest}.")


def check_kl(config, name: str, stage: Mapping) -> Iterator[str]:
  loss = stage["loss"]
  estimator, place = loss["kl_estimator"], loss["kl_in"]
  if not loss["kl_coef"]:
    return
  if place == "loss" and estimator == "k1":
    yield ("loss.kl_estimator: 'k1' in the loss has an expected gradient of "
           "zero, so it would hold nothing to the reference. Use 'k2' or "
           "'k3', or loss.kl_in='reward'.")
  if place == "reward" and estimator != "k1":
    yield (f"loss.kl_estimator: {estimator!r} in the reward does not have the "
           "gradient of the KL; 'k1' does. Use 'k1', or loss.kl_in='loss'.")


def check_importance_sampling(config, name: str, stage: Mapping) -> Iterator[
    str]:
  """Requires it where the sampler's policy is not the trainer's."""
  if stage["loss"]["importance_sampling"] != "none":
    return
  if stage["staleness"]:
    yield (f"staleness: set to {stage['staleness']}, and rollouts of an older "
           "policy need loss.importance_sampling='truncate' or 'mask'.")
  for key in ("cache_dtype", "weights_dtype"):
    if stage["rollout"][key] == "int8":
      yield (f"rollout.{key}: 'int8' samples from another distribution than "
             "the trainer's, and needs loss.importance_sampling='truncate' "
             "or 'mask'.")


def check_staleness(config, name: str, stage: Mapping) -> Iterator[str]:
  if not stage["staleness"]:
    return
  if reader.at(config, "mesh.roles") != "split":
    yield (f"staleness: set to {stage['staleness']}, and nothing can be drawn "
           "while the same devices train. Set mesh.roles='split', or 0.")
  updates = stage["num_minibatches"] * stage["num_epochs"]
  every = reader.at(stage, "checkpoint.every")
  if every % updates:
    yield (f"checkpoint.every: {every} is not a multiple of the {updates} "
           "updates of a batch of rollouts, which with staleness are under "
           "way at once.")


def check_rewards(config, name: str, stage: Mapping) -> Iterator[str]:
  rewards, weights = stage["rewards"], stage["reward_weights"]
  if not rewards:
    yield "rewards: found none, needed at least one module:function."
  if weights and len(weights) != len(rewards):
    yield (f"reward_weights: found {len(weights)} for {len(rewards)} rewards; "
           "give one each, or none.")
  if weights and not any(weights):
    yield (f"reward_weights: found {keys.shown(weights)}, and rewards that "
           "count 0 times teach nothing; needed one that is not 0.")
  if len(set(rewards)) < len(rewards):
    yield (f"rewards: one is there twice in {keys.shown(rewards)}; use "
           "reward_weights.")


def may_have_reference(stage: Mapping) -> bool:
  """Tests for a KL, or a loss of one's own, which may declare ref_logprobs."""
  loss = stage["loss"]
  return bool(loss["kl_coef"]) or loss["function"] != FUNCTION


def check_reference(config, name: str, stage: Mapping) -> Iterator[str]:
  if stage["reference"] and not may_have_reference(stage):
    yield (f"reference: set to {stage['reference']!r}, but it has no effect "
           f"unless {name}.loss.kl_coef > 0; found 0.0.")
  elif stage["reference"] == checks.ADAPTER_OFF:
    if not stage["lora"]["rank"]:
      yield ("reference: 'adapter_off' needs adapters; set lora.rank.")
  elif stage["reference"]:
    yield from checks.weights_problem(
        config, name, "reference", stage["reference"])


def check_shared_prompts(config, name: str, stage: Mapping) -> Iterator[str]:
  if stage["share_prompts"] and config["compute"]["attention"] == "splash":
    yield ("share_prompts: compute.attention='splash' knows no shared prompts. "
           "Use compute.attention='blocks', or share_prompts=False.")


def check_budget(config, name: str, stage: Mapping) -> Iterator[str]:
  rollout = stage["rollout"]
  yield from sampling.budget_problems(config, rollout)
  yield from sampling.check_truncate(
      rollout, max(rollout["max_thinking_tokens"],
                   rollout["max_thinking_steps"]) >= 0,
      "rollout.max_thinking_tokens or rollout.max_thinking_steps")


SCHEMA = StageSchema(
    keys=KEYS, checks=(
        *training.CHECKS, check_groups, check_kl, check_importance_sampling,
        check_staleness, check_rewards, check_reference, check_shared_prompts,
        check_budget, sampling.check_episode, sampling.check_weights_dtype),
    trains=True, samples=True, formerly=("grpo",),
    holds_reference=may_have_reference)
