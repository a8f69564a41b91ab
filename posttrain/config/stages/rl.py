"""Stages of kind `rl`: policy optimisation against verifiable rewards."""

from collections.abc import Iterator, Mapping

from posttrain.config import checks, keys, reader
from posttrain.config.keys import REQUIRED, Key, Needs, Refused, Section
from posttrain.config.stages import StageSchema, sampling, training

# Where the config has none.
CLIP, AGGREGATION, ESTIMATOR = 0.2, "token_mean", "k3"
CORRECTIONS = ("none", "truncate", "mask")

KEYS = Section(
    "Group-relative policy optimisation against verifiable rewards.",
    num_steps=Key(
        int, REQUIRED, "Optimizer updates; a batch of rollouts gives "
        "num_minibatches x num_epochs of them.", "[1, inf)"),
    num_groups=Key(int, REQUIRED, "Prompts per batch of rollouts.",
                   "[1, inf)"),
    group_size=Key(int, REQUIRED, "Completions per prompt.", "[2, inf)"),
    num_minibatches=Key(
        int, 1, "Updates per epoch over a batch of rollouts.", "[1, inf)"),
    num_epochs=Key(int, 1, "Epochs over a batch of rollouts.", "[1, inf)"),
    sequence_length=Key(
        int, REQUIRED, "Tokens per packed row of the learner.", "[2, inf)"),
    rows_per_microbatch=Key(
        int, REQUIRED, "Packed rows per forward pass of the learner, over all "
        "devices.", "[1, inf)"),
    share_prompts=Key(
        bool, False, "In the learner's rows, completions of one prompt lie "
        "behind one copy of it; not with compute.attention='splash'."),
    **training.weights(),
    **training.optimizer("constant"),
    problems=sampling.problems("train"),
    rewards=Key(
        tuple[str, ...], REQUIRED, "What scores a completion; several are "
        "added up.", function=True),
    reward_weights=Key(
        tuple[float, ...], (), "One per reward; unset: all 1.",
        "[-1e6, 1e6]"),
    rollout=Section(
        "How completions are drawn.",
        max_prompt_tokens=sampling.PROMPT_TOKENS,
        max_tokens=sampling.MAX_TOKENS,
        temperature=Key(float, 1.0, "Of sampling, and of the loss's logprobs.",
                        keys.TEMPERATURES),
        max_thinking_tokens=Key(
            int, -1, "The thinking is closed here; -1: no maximum.",
            "[-1, inf)"),
        min_thinking_tokens=Key(
            int, 0, "The thinking cannot end before.", "[0, inf)"),
        num_waits=Key(
            int, 0, "Times an end of thinking becomes thinking.wait_text.",
            keys.WAITS),
        max_thinking_steps=Key(
            int, -1, "The thinking is closed behind so many steps; -1: no "
            "maximum.", "[-1, inf)"),
        truncate=sampling.TRUNCATE,
        chunk=sampling.CHUNK,
        slots=Key(
            int, 0, "Completions decoded together, fewer than a batch has, "
            "each place refilled when its completion ends; 0: all of a "
            "batch, which then waits for its longest.", "[0, inf)"),
        **sampling.DTYPES,
        **sampling.steering(),
        **{name: Refused(
            "the policy ratio would be against a truncated distribution; GRPO "
            "rollouts sample from the whole vocabulary")
           for name in ("top_k", "top_p", "min_p")},
        **{name: Refused(
            "the policy ratio would be against another distribution than the "
            "model's; it is there for evaluation")
           for name in sampling.changed_logits()},
    ),
    loss=Section(
        "The clipped objective.",
        function=Key(
            str, "posttrain.objectives.policy:policy_loss",
            "What turns logprobs and advantages into a numerator, a "
            "denominator and sums; see docs/changing.md.", function=True),
        clip_low=Key(float, CLIP, "The ratio is kept above 1 - clip_low.",
                     "[1e-6, 1]"),
        clip_high=Key(float, CLIP, "The ratio is kept below 1 + clip_high.",
                      "[1e-6, 1e6]"),
        aggregation=Key(
            str, AGGREGATION, "Mean over all tokens of the minibatch, mean of "
            "each completion's mean, or a sum over a constant (Dr. GRPO): "
            "over all its completions, those without a signal too.",
            choices=("token_mean", "sequence_mean", "constant")),
        advantage_std=Key(
            str, "population", "What centred rewards are divided by: their "
            "standard deviation in the group, or nothing.",
            choices=("population", "sample", "none")),
        advantage_eps=Key(
            float, 1e-6, "Added to that standard deviation.", "[0, 1]",
            needs=Needs("loss.advantage_std", "!=", "none")),
        kl_coef=Key(
            float, 0.0, "Weight of the KL to the reference; 0: no reference "
            "is held.", "[0, 1000]"),
        kl_estimator=Key(
            str, ESTIMATOR, "k1: log ratio, for the reward; k2: half its "
            "square; k3: unbiased and positive, as in GRPO. The loss takes k2 "
            "or k3: the expected gradient of k1 there is zero.",
            choices=("k1", "k2", "k3"),
            needs=Needs("loss.kl_coef", ">", 0)),
        kl_in=Key(
            str, "loss", "The loss, per token; or the reward, where each "
            "completion's sum, centred in its group and not divided by any "
            "deviation, comes off its advantage.", choices=("loss", "reward"),
            needs=Needs("loss.kl_coef", ">", 0)),
        importance_sampling=Key(
            str, "none", "For what another policy, or another program, drew: "
            "each token's policy term is multiplied by the ratio of the "
            "trainer's "
            "old probability to the sampler's, cut off at a cap (truncated "
            "importance sampling), or left out where the ratio is above the "
            "cap or below a floor (IcePop).", choices=CORRECTIONS),
        importance_sampling_cap=Key(
            float, 2.0, "Of that ratio.", "[1, 1e6]",
            needs=Needs("loss.importance_sampling", "!=", "none")),
        importance_sampling_floor=Key(
            float, 0.5, "Of that ratio, where tokens are left out.", "[0, 1]",
            needs=Needs("loss.importance_sampling", "==", "mask")),
    ),
    staleness=Key(
        int, 0, "Batches of rollouts that are drawn ahead, while others are "
        "learned from: batch b is by the policy before the updates of batch "
        "b - staleness. Needs devices that only sample.", "[0, inf)"),
    reference=Key(
        str, "", 'An earlier stage, "init" or a checkpoint\'s directory; "": '
        "the weights that this stage starts from; \"adapter_off\": the "
        "policy's without its adapters. The last two share with the policy "
        "whatever it does not train.",
        needs=Needs("loss.kl_coef", ">", 0)),
    health=training.health(
        patience=Key(
            int, 20, "Batches in a row without any signal, or with every "
            "completion clipped.", "[1, inf)"),
        max_unscored=Key(
            float, 0.25, "Share of a batch's completions that may have no "
            "score, as a reward timed out or failed on them, or none applies. "
            "1: any.", "[0, 1]"),
        unscored_patience=Key(
            int, 3, "Batches in a row with more than that, before the run "
            "stops.", "[1, inf)", needs=Needs("health.max_unscored", "<", 1))),
    checkpoint=training.checkpoint(),
    log_every=training.LOG_EVERY,
    save_rollouts_every=Key(
        int, 10, "Steps between saved rollouts (JSONL); 0: none.",
        "[0, inf)"),
    show_sample_every=Key(
        int, 10, "Steps between samples on the console; 0: none.",
        "[0, inf)"),
)


def check_groups(config, name: str, stage: Mapping) -> Iterator[str]:
  yield from training.divides(stage, "num_minibatches", "num_groups")
  updates = stage["num_minibatches"] * stage["num_epochs"]
  if stage["num_steps"] % updates:
    yield (f"num_steps: {stage['num_steps']} is not a multiple of the "
           f"{updates} updates (num_minibatches x num_epochs) that a batch of "
           "rollouts gives.")
  rollout = stage["rollout"]
  longest = rollout["max_prompt_tokens"] + rollout["max_tokens"]
  if stage["sequence_length"] < longest:
    yield (f"sequence_length: {stage['sequence_length']} does not hold "
           f"rollout.max_prompt_tokens + rollout.max_tokens = {longest}.")


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
  """The sampler's policy is another one than the trainer's."""
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


def check_reference(config, name: str, stage: Mapping) -> Iterator[str]:
  if stage["reference"] == checks.ADAPTER_OFF:
    if not stage["lora"]["rank"]:
      yield ("reference: 'adapter_off' needs adapters; set lora.rank.")
  elif stage["reference"]:
    yield from checks.weights_problem(
        config, name, "reference", stage["reference"])


def check_shared_prompts(config, name: str, stage: Mapping) -> Iterator[str]:
  if stage["share_prompts"] and config["compute"]["attention"] == "splash":
    yield ("share_prompts: compute.attention='splash' knows no shared prompts. "
           "Use compute.attention='blocks', or share_prompts=False.")


def check_rollout_budgets(config, name: str, stage: Mapping) -> Iterator[str]:
  rollout = stage["rollout"]
  low, high = (rollout[f"{end}_thinking_tokens"] for end in ("min", "max"))
  if 0 <= high < low:
    yield (f"rollout.min_thinking_tokens: {low} is above "
           f"rollout.max_thinking_tokens={high}.")
  for key, value in (("min_thinking_tokens", low),
                     ("max_thinking_tokens", high)):
    if value > rollout["max_tokens"]:
      yield (f"rollout.{key}: {value} is more than "
             f"rollout.max_tokens={rollout['max_tokens']}.")
  if rollout["max_thinking_steps"] >= 0:
    yield from sampling.counts_steps(config, "rollout.max_thinking_steps")
  if high >= 0 or low > 0 or rollout["num_waits"]:
    yield from sampling.thinks(
        config, "rollout.max_thinking_tokens" if high >= 0 else
        "rollout.min_thinking_tokens" if low > 0 else "rollout.num_waits")
  yield from sampling.draws_waits(config, rollout, rollout["num_waits"])
  yield from sampling.truncates(rollout, high >= 0 or (
      rollout["max_thinking_steps"] >= 0), "rollout.max_thinking_tokens or "
      "rollout.max_thinking_steps")


def check_slots(config, name: str, stage: Mapping) -> Iterator[str]:
  slots = stage["rollout"]["slots"]
  completions = stage["num_groups"] * stage["group_size"]
  if slots >= completions:
    yield (f"rollout.slots: {slots} is not below the num_groups x group_size "
           f"= {completions} completions of a batch, so no place would be "
           "refilled. Use fewer, or 0 for all of them at once.")


SCHEMA = StageSchema(
    keys=KEYS, checks=(
        *training.CHECKS, check_groups, check_kl, check_importance_sampling,
        check_staleness, check_rewards, check_reference, check_shared_prompts,
        check_rollout_budgets, check_slots, sampling.check_weights_dtype),
    trains=True, samples=True, formerly=("grpo",),
    holds_reference=lambda stage: bool(stage["loss"]["kl_coef"]))
