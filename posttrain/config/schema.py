"""Every key of a config: its type, its default, its range, what it means.

This file is the reference; `docs/configs.md` is generated from it. A config
has the sections of `TOP` and one section per name in `config.stages`, laid out
by that section's `kind`. `needs` names a condition without which a key has no
effect: setting the key anyway is an error, as no key is ever inert.
"""

from posttrain.config import keys, machine, parts
from posttrain.config.keys import (
    REQUIRED,
    Items,
    Key,
    Needs,
    Refused,
    Section,
)
from posttrain.model.config import SAMPLING_DTYPES

# Where the config has none.
CLIP, AGGREGATION, ESTIMATOR = 0.2, "token_mean", "k3"
CORRECTIONS = ("none", "truncate", "mask")
ADAPTER_OFF = "adapter_off"  # As a reference.


def _source(**extra: Key) -> Section:
  return Section(
      "One source of examples: a file or a task, not both.",
      path=Key(str, "", "A .jsonl or .parquet file."),
      task=Key(str, "", "What gives demonstrations.", function=True),
      split=Key(
          str, "train", "The task's split.", needs=Needs("task", "!=", "")),
      args=Key(
          dict, {}, "More keyword arguments of the task.",
          needs=Needs("task", "!=", "")),
      **extra)


def _handling(needs: Needs | None = None) -> dict[str, Key]:
  return dict(
      on_overlong=Key(
          str, "error", "An example longer than sequence_length; truncate "
          "keeps EOS.", choices=("error", "drop", "truncate"), needs=needs),
      on_no_target=Key(
          str, "error", "An example without a token in the loss.",
          choices=("error", "drop"), needs=needs),
      on_malformed=Key(
          str, "error", "A row that cannot be read; skipped ones are counted.",
          choices=("error", "skip"), needs=needs),
      packing=Key(bool, True, "Several examples share a row.", needs=needs),
  )


_HELD_OUT = Needs("eval_data.sources", "!=", ())


def _problems(split: str, **extra: Key) -> Section:
  return Section(
      "Where prompts come from.",
      task=Key(str, REQUIRED, "What gives problems.", function=True),
      split=Key(str, split, "The task's split."),
      args=Key(dict, {}, "More keyword arguments of the task."),
      **extra)


_PROMPT_TOKENS = Key(
    int, REQUIRED, "Room for the prompt; a longer one is an error.",
    "[1, inf)")
_MAX_TOKENS = Key(
    int, REQUIRED, "Room for the completion, thinking included.", "[1, inf)")
_TRUNCATE = Key(
    bool, False, "At a maximum of thinking tokens or steps the completion "
    "stops, unclosed.")
_CHUNK = Key(
    int, 32, "Tokens decoded per device call; changes no token. SIGTERM is "
    "looked at in between: a call should take well under the grace period.",
    "[1, 65536]")
_DTYPES = dict(
    cache_dtype=Key(
        str, "compute", "Of cached keys and values: as compute.dtype, or 8 "
        "bits with a float32 for each head and token.",
        choices=SAMPLING_DTYPES),
    weights_dtype=Key(
        str, "compute", "Of the matrices that the decode loop multiplies by: "
        "as they are, or 8 bits with a float32 for each output, made anew "
        "for each call. Not for experts.", choices=SAMPLING_DTYPES))
_METRIC_EVERY = Key(
    int, 10, "Steps between rows of the console's table.", "[1, inf)")

TOP = Section(
    "Keys outside the stages. A run may go on with another `profile`.",
    seed=Key(int, 0, "Of initial weights, data order and sampling.",
             "[0, 4294967295]"),
    model=Key(
        str, "tiny", 'A preset of posttrain.model.presets; "": the shape of '
        "what `init` names."),
    model_overrides=Key(
        dict, {}, "Fields of ModelConfig that replace the preset's."),
    stages=Key(
        tuple[str, ...], REQUIRED, "The stages in order; each names a section "
        "of this config."),
    chat_template=Key(
        str, "", 'A Jinja file; "": the tokenizer\'s own; "plain": prompt, '
        "completion and EOS without a template."),
    init=Section(
        "Where the first stage's weights come from.",
        kind=Key(
            str, "random", "Fresh weights, published files (`preset`), a "
            "finished workdir, or a directory of checkpoints.",
            choices=("random", "preset", "workdir", "directory")),
        path=Key(
            str, "", "Workdir, directory, or published files: a directory as "
            "transformers saves it, or a GGUF file. Those of smollm2-135m "
            "are found by themselves.", needs=Needs("init.kind", "!=",
                                                      "random")),
        stage=Key(
            str, "", 'Stage of that workdir; "": its last finished one.',
            needs=Needs("init.kind", "==", "workdir")),
    ),
    tokenizer=Section(
        "Text to ids. Unset: the tokenizer that `init` comes with.",
        path=Key(str, "", "A tokenizer.json, a SentencePiece .model, or a "
                 "directory with one."),
        train=Key(
            str, "", "What gives the texts on which a small SentencePiece "
            "vocabulary is trained.", function=True),
        model_type=Key(
            str, "word", "Kind of the trained vocabulary.",
            choices=("word", "unigram", "bpe"),
            needs=Needs("tokenizer.train", "!=", "")),
        vocab_size=Key(
            int, 0, "Size of the trained vocabulary; 0: as many as there are "
            'words (model_type "word" only).', "[0, inf)",
            needs=Needs("tokenizer.train", "!=", "")),
        symbols=Key(
            tuple[str, ...], (), "Strings that must each be one token.",
            needs=Needs("tokenizer.train", "!=", "")),
    ),
    thinking=parts.thinking(),
    mesh=machine.MESH,
    compute=machine.COMPUTE,
    profile=machine.PROFILE,
)

SFT = Section(
    "Supervised fine-tuning on packed rows.",
    num_steps=Key(int, REQUIRED, "Optimizer updates.", "[1, inf)"),
    sequence_length=Key(int, REQUIRED, "Tokens per packed row.", "[2, inf)"),
    rows=Key(int, REQUIRED, "Packed rows per step, over all devices.",
             "[1, inf)"),
    num_microbatches=Key(
        int, 1, "Parts into which a step's rows are cut to save memory.",
        "[1, inf)"),
    **parts.weights(),
    **parts.optimizer("cosine"),
    data=Section(
        "Training examples.",
        sources=Items(
            "Mixed by weight.", REQUIRED, _source(weight=Key(
                float, 1.0, "Share of the mixture, relative.", "[1e-6, 1e6]"))),
        **_handling(),
        shuffle=Key(bool, True, "A new order each epoch, from the seed.")),
    eval_data=Section(
        "Held-out examples, read once in order. None by default.",
        sources=Items("Read one after the other.", (), _source()),
        **_handling(_HELD_OUT)),
    eval_every=Key(
        int, 0, "Steps between evaluation losses; 0: one, at the end.",
        "[0, inf)", needs=_HELD_OUT),
    health=parts.health(),
    checkpoint=parts.checkpoint(),
    log_every=_METRIC_EVERY,
)

RL = Section(
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
    **parts.weights(),
    **parts.optimizer("constant"),
    problems=_problems("train"),
    rewards=Key(
        tuple[str, ...], REQUIRED, "What scores a completion; several are "
        "added up.", function=True),
    reward_weights=Key(
        tuple[float, ...], (), "One per reward; unset: all 1.",
        "[-1e6, 1e6]"),
    rollout=Section(
        "How completions are drawn.",
        max_prompt_tokens=_PROMPT_TOKENS,
        max_tokens=_MAX_TOKENS,
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
        truncate=_TRUNCATE,
        chunk=_CHUNK,
        slots=Key(
            int, 0, "Completions decoded together, fewer than a batch has, "
            "each place refilled when its completion ends; 0: all of a "
            "batch, which then waits for its longest.", "[0, inf)"),
        **_DTYPES,
        **parts.steering(),
        **{name: Refused(
            "the policy ratio would be against a truncated distribution; GRPO "
            "rollouts sample from the whole vocabulary")
           for name in ("top_k", "top_p", "min_p")},
        **{name: Refused(
            "the policy ratio would be against another distribution than the "
            "model's; it is there for evaluation")
           for name in parts.changed_logits()},
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
    health=parts.health(
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
    checkpoint=parts.checkpoint(),
    log_every=_METRIC_EVERY,
    save_rollouts_every=Key(
        int, 10, "Steps between saved rollouts (JSONL); 0: none.",
        "[0, inf)"),
    show_sample_every=Key(
        int, 10, "Steps between samples on the console; 0: none.",
        "[0, inf)"),
)

EVALUATE = Section(
    "Accuracy, and how it scales with thinking tokens.",
    problems=_problems(
        "test", count=Key(
            int, 0, "The first so many problems; 0: all.", "[0, inf)")),
    reward=Key(
        str, REQUIRED, "What scores a completion; 1 is correct.",
        function=True),
    extract=Key(
        str, "", "What turns a completion into its canonical answer, for "
        "votes.", function=True),
    baseline=Key(
        str, "", "What scores the best constant answer: function(split, "
        "count=..., **args) -> answer, correct.", function=True),
    checkpoints=Key(
        tuple[str, ...], (), 'Earlier stages, "init", or checkpoint '
        'directories; unset: "init" and every earlier training stage.'),
    samples_per_problem=Key(
        int, 1, "Completions per problem and cell.", keys.SAMPLES,
        needs=Needs("rollout.temperature", ">", 0)),
    pass_at=Key(
        tuple[int, ...], (1,), "Values of k for pass@k.", "[1, inf)"),
    max_thinking_tokens=Key(
        tuple[int, ...], (), "Budgets of the curve, each a cell.",
        "[0, inf)"),
    num_waits=Key(
        tuple[int, ...], (), "Numbers of forced waits, each a cell.",
        keys.WAITS),
    wait_max_thinking_tokens=Key(
        tuple[int, ...], (), "Budgets of the cells of waits, each with every "
        "number of waits; -1: no maximum, so that a row may use up its tokens "
        "without an answer; unset: the largest of max_thinking_tokens, or no "
        "maximum without any.", "[-1, inf)",
        needs=Needs("num_waits", "!=", ())),
    instructions=parts.instructions(),
    majority=Section(
        "The majority-vote baseline at equal tokens.",
        max_samples=Key(
            int, 0, "Votes at most; 0: no baseline.", f"0 or {keys.SAMPLES}",
            needs=Needs("extract", "!=", ""))),
    rollout=Section(
        "How completions are drawn.",
        max_prompt_tokens=_PROMPT_TOKENS,
        max_tokens=_MAX_TOKENS,
        temperature=Key(float, 1.0, "0: the likeliest token.",
                        f"0 or {keys.TEMPERATURES}"),
        top_k=Key(int, 0, "Likeliest tokens kept; 0: all.", "[0, inf)",
                  needs=Needs("rollout.temperature", ">", 0)),
        top_p=Key(float, 1.0, "Probability mass kept.", "(0, 1]",
                  needs=Needs("rollout.temperature", ">", 0)),
        min_p=Key(float, 0.0, "Least probability kept, relative to the "
                  "likeliest token's.", "[0, 1]",
                  needs=Needs("rollout.temperature", ">", 0)),
        truncate=_TRUNCATE,
        batch_rows=Key(int, 64, "Completions decoded together.", "[1, inf)"),
        refill=Key(
            bool, False, "The place of a completion that ends is refilled; "
            "otherwise a batch waits for its longest."),
        chunk=_CHUNK,
        **_DTYPES,
        **parts.steering(),
        **parts.changed_logits(),
    ),
)

KINDS = {"sft": SFT, "rl": RL, "evaluate": EVALUATE}
TRAINING_KINDS = ("sft", "rl")
