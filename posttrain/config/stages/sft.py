"""Stages of kind `sft`: supervised fine-tuning on packed rows."""

from collections.abc import Iterator, Mapping

from posttrain.config import keys
from posttrain.config.keys import REQUIRED, Items, Key, Needs, Section
from posttrain.config.stages import StageSchema, training


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

KEYS = Section(
    "Supervised fine-tuning on packed rows.",
    num_steps=Key(int, REQUIRED, "Optimizer updates.", "[1, inf)"),
    sequence_length=Key(int, REQUIRED, "Tokens per packed row.", "[2, inf)"),
    rows=Key(int, REQUIRED, "Packed rows per step, over all devices.",
             "[1, inf)"),
    num_microbatches=Key(
        int, 1, "Parts into which a step's rows are cut to save memory.",
        "[1, inf)"),
    **training.weights(),
    **training.optimizer("cosine"),
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
    health=training.health(),
    checkpoint=training.checkpoint(),
    log_every=training.LOG_EVERY,
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
