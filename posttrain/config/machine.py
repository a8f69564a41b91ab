"""Keys of how, and not of what: devices, memory, speed and traces.

They leave the experiment alone, up to rounding.
"""

from posttrain.config.keys import Key, Needs, Section
from posttrain.model.config import (
    ATTENTION_FORMS,
    DECODE_ATTENTION,
    DTYPES,
    QUANTIZED,
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
