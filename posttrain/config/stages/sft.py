"""Stages of kind `sft`: supervised fine-tuning on packed rows."""

from collections.abc import Iterator, Mapping

from posttrain.config import keys
from posttrain.config.keys import REQUIRED, Items, Key, Needs, Section
from posttrain.config.stages import StageSchema, training


def _source(**extra: Key) -> Section:
  of_task = Needs("task", "!=", "")
  return Section(
      "One source of examples: a file or a task, not both.",
      path=Key(str, "", "A .jsonl or .parquet file."),
      task=Key(str, "", "Function that gives demonstrations.", function=True),
      split=Key(str, "train", "The task's split.", needs=of_task),
      args=Key(dict, {}, "Further keyword arguments of the task.",
               needs=of_task),
      **extra)


def _handling(needs: Needs | None = None) -> dict[str, Key]:
  return dict(
      on_overlong=Key(str, "error", "An example longer than sequence_length: "
                      "an error, dropped, or truncated with its EOS kept.",
                      choices=("error", "drop", "truncate"), needs=needs),
      on_no_target=Key(
          str, "error", "An example without a token in the loss: an error, or "
          "dropped.", choices=("error", "drop"), needs=needs),
      on_malformed=Key(
          str, "error", "A row that cannot be read: an error, or skipped and "
          "counted.", choices=("error", "skip"), needs=needs),
      packing=Key(bool, True, "Sequence packing: several examples share a row.",
                  needs=needs),
  )


_HELD_OUT = Needs("eval_data.sources", "!=", ())

KEYS = Section(
    "Supervised fine-tuning (SFT) on packed rows.",
    num_steps=Key(int, REQUIRED, "Optimizer updates.", "[1, inf)"),
    sequence_length=Key(int, REQUIRED, "Tokens per packed row.", "[2, inf)"),
    rows=Key(int, REQUIRED, "Batch size: packed rows per update, over all "
             "devices.", "[1, inf)"),
    num_microbatches=Key(
        int, 1, "Gradient accumulation: microbatches into which an update's "
        "rows are cut, to save memory. The update is the same.", "[1, inf)"),
    data=Section(
        "Training examples.",
        sources=Items(
            "Sources, mixed by weight.", REQUIRED, _source(weight=Key(
                float, 1.0, "Share of the mixture, relative to the others.",
                "[1e-6, 1e6]"))),
        **_handling(),
        shuffle=Key(bool, True, "A new order each epoch, from the seed.")),
    eval_data=Section(
        "Held-out examples for an evaluation loss, read once in order.",
        sources=Items(
            "Sources, read one after the other. None by default.", (),
            _source()),
        **_handling(_HELD_OUT)),
    eval_every=Key(int, 0, "Steps between evaluation losses. 0: one, at the "
                   "end.", "[0, inf)", needs=_HELD_OUT),
    **training.shared("cosine"),
)


def check_rows(config, name: str, stage: Mapping) -> Iterator[str]:
  yield from training.divides(stage, "num_microbatches", "rows")


def check_sources(config, name: str, stage: Mapping) -> Iterator[str]:
  if not stage["data"]["sources"]:
    yield "data.sources: found none, needed at least one."
  for part in ("data", "eval_data"):
    for index, source in enumerate(stage[part]["sources"]):
      path = f"{part}.sources.{index}"
      if bool(source["path"]) == bool(source["task"]):
        yield (f"{path}: set one of path and task; found "
               f"{keys.shown(dict(source))}.")


SCHEMA = StageSchema(
    keys=KEYS, checks=(*training.CHECKS, check_rows, check_sources),
    trains=True, fits_tokenizer=True)
