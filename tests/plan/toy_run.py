"""A run of two kinds of stages of a user's own.

That of `tests.stages.toy_kind`, and `BARE`, which gives its keys and what it
runs, and nothing else.
"""

import ml_collections

from posttrain.config.keys import Key, Section
from posttrain.config.stages import StageSchema
from posttrain.stages.stage import Stage

BARE = Stage(
    schema=StageSchema(Section("Looks.", count=Key(int, 3, "Times."))),
    run=lambda context, start: start)


def get_config():
  config = ml_collections.ConfigDict()
  config.model_overrides = dict(vocab_size=512, embed=64, head_dim=16)
  config.tokenizer = dict(
      train="posttrain.tasks.signs:corpus", model_type="word",
      symbols=("<think>", "</think>"))
  config.chat_template = "plain"
  config.thinking = dict(newline="")
  config.stages = ("drill", "look")
  config.drill = dict(
      kind="tests/stages/toy_kind.py:STAGE", base=5, num_steps=2, rows=8,
      sequence_length=32, learning_rate=1e-3)
  config.look = dict(kind=f"{__file__}:BARE")
  return config
