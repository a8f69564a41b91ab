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
    "The strings around the thinking: budget forcing inserts them, metrics "
    "find the thinking by them, and SFT spells them as they are inserted.",
    start=Key(str, "<think>", 'Opens the thinking. "": a completion begins in '
              "it.", needs=_THINKS),
    end=Key(
        str, "</think>", 'Closes the thinking. "": the model does not think.'),
    delimiters=Key(tuple[str, ...], (), "Further strings that end the thinking "
                   "when the model samples them.", needs=_THINKS),
    newline=Key(str, "\n", "Inserted before a forced `end`, unless the last "
                "token ends in a newline.", needs=_THINKS),
    final_answer=Key(str, "", "Inserted after an `end` that a budget forced.",
                     needs=_THINKS),
    wait_text=Key(str, "Wait", "Replaces a delimiter while waits are left, so "
                  "that the model goes on thinking (s1).", needs=_THINKS),
    more_wait_texts=Key(tuple[str, ...], (), "Further wait texts. The waits of "
                        "a completion take wait_text and these in turn, or as "
                        "rollout.wait_order says.", needs=_THINKS),
    step=Key(str, "", 'Ends a step of the thinking, such as a blank line. "": '
             "steps are not counted.", needs=_THINKS),
)

_SPLIT = Needs("mesh.roles", "==", "split")

MESH = Section(
    "Devices per axis of the mesh, one axis for each kind of parallelism. One "
    "axis at most may be -1: all devices that remain.",
    fsdp=Key(
        int, -1, "FSDP (fully sharded data parallelism, ZeRO-3): splits the "
        "batch, and the parameters, gradients and optimizer state at rest. "
        "Each layer's parameters are gathered when it runs.", "[-1, inf)"),
    tensor=Key(int, 1, "Tensor parallelism: splits attention heads, "
               "feed-forward and vocabulary.", "[-1, inf)"),
    expert=Key(int, 1, "Expert parallelism: splits the experts of a mixture "
               "(MoE). The batch and all other parameters are split over it as "
               "over fsdp.", "[-1, inf)"),
    data=Key(int, 1, "Data parallelism with replicas: each holds all "
             "parameters and takes its part of the batch. With several TPU "
             "slices, every slice holds one or more replicas.", "[-1, inf)"),
    context=Key(
        int, 1, "Context parallelism by all-to-all (Ulysses): splits the "
        "sequence length in training. Parameters at rest are split over it as "
        "over fsdp, and the sampler splits its batch over it.", "[-1, inf)"),
    cpu_devices=Key(int, 1, "Devices that JAX makes of the CPU where there is "
                    "no accelerator. They share the cores. Two on two cores "
                    "train a small model faster than one, whose small "
                    "operations use a single core.", "[1, 256]"),
    roles=Key(str, "shared", '"shared": rollouts are sampled on the devices '
              'that train (colocated). "split": some devices of each host only '
              "sample (disaggregated, mesh.sampling), and the axes above are "
              "of the rest. See docs/pods.md.", choices=("shared", "split")),
    sampling=Section(
        'Mesh of the devices that only sample, with mesh.roles="split".',
        devices=Key(int, 1, "Devices of each host that only sample: its first "
                    "ones.", "[1, inf)", needs=_SPLIT),
        **{name: Key(
            int, size, f"The same as mesh.{name}, for the devices that sample.",
            "[-1, inf)", needs=_SPLIT)
           for name, size in dict(fsdp=-1, tensor=1, expert=1, data=1).items()},
    ),
)

COMPUTE = Section(
    "Precision, memory and speed. Logits and trained parameters are float32.",
    dtype=Key(str, "float32", "Precision of activations and matrix products.",
              choices=("float32", "bfloat16")),
    remat=Key(str, "none", "Rematerialisation (activation checkpointing, "
              "gradient checkpointing): the backward pass recomputes nothing, "
              "each whole layer, or all but its matrix products.",
              choices=("none", "full", "dots")),
    unroll=Key(
        int, 1, "Layers per iteration of the scan over layers.", "[1, inf)"),
    moe=Key(
        str, "auto", "Computation of a mixture's experts (MoE): all experts on "
        "every token (dense), each expert on its own tokens (grouped matrix "
        "products), or whichever is faster: grouped on a TPU, dense elsewhere. "
        "Only for a model with experts.", choices=("auto", "dense", "grouped")),
    attention=Key(
        str, "reference", "Attention in training and prefill: over a mask of "
        "all pairs of tokens (reference); blockwise as flash attention, which "
        "is faster and whose memory is linear in the tokens (blocks); or the "
        "splash attention kernel for TPUs, which takes whole blocks (splash).",
        choices=ATTENTION_FORMS),
    attention_block=Key(
        int, 128, "Tokens per block of blockwise attention.", "[1, inf)",
        needs=Needs("compute.attention", "!=", "reference")),
    gradients=Key(str, "reference", "Products that give the gradients of the "
                  "layers' matrices: as JAX's autodiff writes them, or in the "
                  "layout of the weights, which is faster on a CPU and rounds "
                  "differently.", choices=("reference", "in_layout")),
    decode_attention=Key(
        str, "reference", "Attention of a decode step: over the whole KV "
        "cache, or by a kernel that reads only the blocks of the cache that a "
        "row sees. The kernel is for TPUs and heads of a multiple of 128.",
        choices=DECODE_ATTENTION),
    frozen_dtype=Key(
        str, "float32", "Precision of parameters that are not trained: the "
        "base under LoRA, and a KL reference. int8, int4 and nf4 quantise the "
        "blocks' matrices (QLoRA), in blocks of 64 with a scale, and keep the "
        "rest in bfloat16; they need the extra qlora.",
        choices=(*DTYPES, *QUANTIZED)),
    offload=Key(tuple[str, ...], (), "Host offload: what is kept in the hosts' "
                "memory while an RL stage does not need it. The reference is "
                "on the devices for its logprobs only; the optimizer state is "
                "away while completions are sampled and scored. No number "
                "changes.", choices=("reference", "optimizer")),
    on_too_large=Key(
        str, "error", "Out-of-memory check before the first stage: a stage "
        "whose estimate is above one and a half times the memory of a device "
        "is an error or a warning.", choices=("error", "warn")),
    loss_chunk=Key(int, 128, "Positions whose logits exist at one time in a "
                   "loss (chunked cross-entropy).", "[1, inf)"),
)

PROFILE = Section(
    "A profiler trace (XProf), in STAGE/profile of the workdir; see "
    "docs/pods.md.",
    steps=Key(tuple[int, ...], (), "The first and the last step to trace, such "
              "as 10,12, or one step. Unset: no trace.", "[1, inf)"),
    stages=Key(tuple[str, ...], (), "Training stages that are traced. Unset: "
               "all.", needs=Needs("profile.steps", "!=", ())),
)

_TRAINS_VOCABULARY = Needs("tokenizer.train", "!=", "")

TOP = Section(
    "Keys outside the stages. A run may be resumed with another `profile`.",
    seed=Key(int, 0, "Seed of initial weights, data order and sampling.",
             "[0, 4294967295]"),
    model=Key(
        str, "tiny", 'Shape of the model: a preset of posttrain.model.presets, '
        'or "" for the shape of what `init` names.'),
    model_overrides=Key(
        dict, {}, "Fields of ModelConfig that replace those of the preset."),
    stages=Key(tuple[str, ...], REQUIRED, "The stages in order. Each names a "
               "section of this config."),
    chat_template=Key(
        str, "", 'Chat template: a Jinja file; "" for the tokenizer\'s own; '
        '"plain" for prompt, completion and EOS without a template.'),
    init=Section(
        "Weights that the first stage starts from.",
        kind=Key(str, "random", "Fresh weights, published files (`preset`), a "
                 "finished workdir, or a directory of checkpoints.",
                 choices=("random", "preset", "workdir", "directory")),
        path=Key(str, "", "The workdir, the directory of checkpoints, or the "
                 "published files: a directory as transformers saves it, or a "
                 "GGUF file. Those of smollm2-135m are found by themselves.",
                 needs=Needs("init.kind", "!=", "random")),
        stage=Key(str, "", 'Stage of that workdir. "": its last finished one.',
                  needs=Needs("init.kind", "==", "workdir")),
    ),
    tokenizer=Section(
        "Text to token ids. Unset: the tokenizer that `init` comes with.",
        path=Key(str, "", "A tokenizer.json, a SentencePiece .model, or a "
                 "directory with one of them."),
        train=Key(str, "", "Function that gives the texts on which a small "
                  "SentencePiece vocabulary is trained.", function=True),
        model_type=Key(
            str, "word", "Algorithm of the trained vocabulary.",
            choices=("word", "unigram", "bpe"), needs=_TRAINS_VOCABULARY),
        vocab_size=Key(int, 0, "Size of the trained vocabulary. 0: one entry "
                       'for every word (model_type "word" only).', "[0, inf)",
                       needs=_TRAINS_VOCABULARY),
        symbols=Key(tuple[str, ...], (), "Strings that must each be one token.",
                    needs=_TRAINS_VOCABULARY),
    ),
    thinking=THINKING,
    mesh=MESH,
    compute=COMPUTE,
    profile=PROFILE,
)
