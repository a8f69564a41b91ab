"""The renderer and the weights that `sample` and `chat` are pointed at."""

from ml_collections import config_dict

from posttrain import weights
from posttrain import workdir as workdir_lib
from posttrain.model.transformer import Transformer
from posttrain.text import render


def load(
    config: config_dict.ConfigDict, path: str | None, stage: str,
) -> tuple[render.Renderer, Transformer]:
  """The renderer and the weights, which must have been trained with it."""
  workdir = workdir_lib.open_existing(
      path, is_writer=False) if path else None
  tokenizer = weights.tokenizer(config, workdir)
  renderer = render.make_renderer(tokenizer, config.chat_template)
  shape = weights.model_config(config, tokenizer.vocab_size, workdir)
  if workdir is None or stage == "init":
    return renderer, weights.initial(config, shape, renderer.hash)
  return renderer, weights.of_stage(
      shape, workdir, weights.trained_stage(workdir, stage), renderer.hash)
