"""Every key outside the stages: its type, its default, its range, its meaning.

`docs/configs.md` is generated from this file and from `stages/`. A config has
the sections of `TOP` and one section per name in `config.stages`, laid out by
that section's `kind`. `needs` names a condition without which a key has no
effect: setting the key anyway is an error, as no key is ever inert.
"""

from posttrain.config.keys import REQUIRED, Key, Needs, Section
from posttrain.model.config import (
    ATTENTION_FORMS,
    DECODE_ATTENTION,
    DTYPES,
    QUANTIZED,
)

_THINKS = Needs("thinking.end", "!=", "")
THINKING = Section(
    "The strings around the thinking, for budgets and for metrics.",
    start=Key(str, "<think>", 'Opens the thinking; "": a completion '
              "begins in it.", needs=_THINKS),
    end=Key(str, "</think>", 'Closes it; "": the model does not think.'),
    delimiters=Key(
        tuple[str, ...], (), "Further strings that end thinking when the "
        "model samples them.", needs=_THINKS),
    newline=Key(
        str, "\n", "Put before a forced `end` unless the last token ends "
        "in a newline.", needs=_THINKS),
    final_answer=Key(
        str, "", "Put after an `end` forced at the maximum.",
        needs=_THINKS),
    wait_text=Key(
        str, "Wait", "Replaces a delimiter while waits are left.",
        needs=_THINKS),
    more_wait_texts=Key(
        tuple[str, ...], (), "Further wait texts: the waits of a "
        "completion take that one and these in turn.",
        needs=_THINKS),
    step=Key(
        str, "", "Ends a step of the thinking, such as a blank line; "
        '"": steps are not counted.',
        needs=_THINKS),
)

_SPLIT = Needs("mesh.roles", "==", "split")

MESH = Section(
    "Devices per axis; -1, once at most: all that remain.",
    fsdp=Key(int, -1, "Splits the batch and the parameters at rest.",
             "[-1, inf)"),
    tensor=Key(int, 1, "Splits heads, feed-forward and vocabulary.",
               "[-1, inf)"),
    expert=Key(int, 1, "Splits the experts of a mixture; of the rest it "
               "splits the batch and the parameters at rest, as fsdp.",
               "[-1, inf)"),
    data=Key(int, 1, "Replicas of all parameters; splits the batch. Of "
             "several slices, each has one or more.", "[-1, inf)"),
    context=Key(int, 1, "Splits the length of what is trained on, and the "
                "parameters at rest, as fsdp; the sampler splits its rows "
                "over it.", "[-1, inf)"),
    cpu_devices=Key(
        int, 1, "Without an accelerator: devices that the cores are "
        "shared between. Two on two cores train a small model faster "
        "than one, whose small operations use a single core.",
        "[1, 256]"),
    roles=Key(
        str, "shared", "Whether a GRPO stage samples on the devices that it "
        "trains on, or on a part of each host's that does nothing else; the "
        "sizes above are then those of the rest. See docs/pods.md.",
        choices=("shared", "split")),
    sampling=Section(
        "The devices that sample, where they are a part of their own.",
        devices=Key(int, 1, "Of each host, its first ones.", "[1, inf)",
                    needs=_SPLIT),
        **{name: Key(int, size, f"As mesh.{name}.", "[-1, inf)", needs=_SPLIT)
           for name, size in dict(fsdp=-1, tensor=1, expert=1, data=1).items()},
    ),
)

COMPUTE = Section(
    "Precision and memory. Logits and trained parameters are float32.",
    dtype=Key(str, "float32", "Of activations and matrix products.",
              choices=("float32", "bfloat16")),
    remat=Key(
        str, "none", "What the backward pass computes again: nothing, "
        "everything, or all but matrix products.",
        choices=("none", "full", "dots")),
    unroll=Key(int, 1, "Layers per iteration of the layer scan.",
               "[1, inf)"),
    moe=Key(str, "auto", "How a mixture's experts are computed: all of "
            "them on every token, each on its own tokens, or as is faster: "
            "grouped on a TPU, dense elsewhere. For a model with experts.",
            choices=("auto", "dense", "grouped")),
    attention=Key(
        str, "reference", "Of whole sequences, in training and prefill: "
        "over a mask of all pairs of tokens; in blocks of them, which is "
        "faster and needs memory for the tokens alone; or by a kernel for "
        "TPUs, which takes lengths of whole blocks.",
        choices=ATTENTION_FORMS),
    attention_block=Key(
        int, 128, "Tokens of a block of attention.", "[1, inf)",
        needs=Needs("compute.attention", "!=", "reference")),
    gradients=Key(
        str, "reference", "Of the layers' matrices: computed as JAX does, "
        "or in the layout of the weights, which is faster on a CPU and "
        "rounds otherwise.", choices=("reference", "in_layout")),
    decode_attention=Key(
        str, "reference", "Of the sampler's steps: products over the "
        "whole cache, or a kernel that reads the blocks of it that a row "
        "sees; for a TPU, and heads of a multiple of 128.",
        choices=DECODE_ATTENTION),
    frozen_dtype=Key(
        str, "float32", "Of parameters that are not trained, a "
        "reference's too. int8, int4 and nf4 are of the blocks' matrices, "
        "in blocks of 64 with a scale; what else is frozen is then "
        "bfloat16. They need the extra qlora.",
        choices=(*DTYPES, *QUANTIZED)),
    offload=Key(
        tuple[str, ...], (), "What of a GRPO stage waits in the hosts' "
        "memory while it is not needed: the reference but for its "
        "logprobs, the optimizer's state while completions are drawn and "
        "scored. No number changes.", choices=("reference", "optimizer")),
    on_too_large=Key(
        str, "error", "A stage's memory, as estimated before the first of "
        "them begins, is more than one and a half times what a device has: "
        "stop, or warn and go on.", choices=("error", "warn")),
    loss_chunk=Key(
        int, 128, "Positions whose logits exist at one time in a loss.",
        "[1, inf)"),
)

PROFILE = Section(
    "An XProf trace, in STAGE/profile of the workdir; see docs/pods.md.",
    steps=Key(
        tuple[int, ...], (), "The first and the last step to trace, such "
        "as 10,12, or one step; unset: no trace.", "[1, inf)"),
    stages=Key(
        tuple[str, ...], (), "Training stages that are traced; unset: all.",
        needs=Needs("profile.steps", "!=", ())),
)

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
    thinking=THINKING,
    mesh=MESH,
    compute=COMPUTE,
    profile=PROFILE,
)
