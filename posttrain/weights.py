"""Sources of a model's shape, tokenizer and weights, by `init.kind`.

  init.kind  tokenizer, unless `tokenizer` names one;   weights
             shape, unless `model` names one
  random     both must be named                         from the seed
  preset     those of the published files               those files
  workdir    the workdir's                              a stage's last step
  directory  those next to the checkpoint, if any       one checkpoint

Tokenizer and shape are copied to the workdir, as `tokenizer/` and `model.json`,
since their sources may be moved away. `posttrain import` writes a directory for
the last kind.
"""

import dataclasses
import hashlib
import json
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from ml_collections import config_dict

from posttrain import sharding
from posttrain import workdir as workdir_lib
from posttrain.interop import released, smollm2
from posttrain.model import moe, transformer
from posttrain.model.config import COMPUTE_FIELDS, ModelConfig
from posttrain.model.presets import PRESETS
from posttrain.model.transformer import Transformer
from posttrain.tasks import loading
from posttrain.text import render, thinking, vocabulary
from posttrain.text import tokenizer as tokenizer_lib
from posttrain.train import checkpoints, fingerprint, state, trainable

FROZEN = "frozen"  # Folder of a workdir: weights that stages do not train.

# Presets whose published files can be found, and a function that reads them.
PUBLISHED: dict[str, Callable[[], released.Release]] = {
    smollm2.PRESET: smollm2.read}

SHAPE = "model.json"  # In a workdir, next to the tokenizer's folder.
SUMS = "SHA256SUMS"  # In that folder, in the format of sha256sum.


def model_config(
    config: config_dict.ConfigDict, vocab_size: int,
    workdir: workdir_lib.Workdir | None = None,
) -> ModelConfig:
  """Returns the model's shape, with the config's overrides and compute
  settings.

  Args:
    vocab_size: the tokenizer's number of ids.
    workdir: holds the shape of an earlier start, if there was one.

  Raises:
    ValueError: nothing gives the shape, or the vocabulary does not fit.
  """
  shape = PRESETS[config.model] if config.model else _shape(config, workdir)
  # How it is computed is the config's own choice, in the shape of any source.
  compute = {name: config.compute[name] for name in COMPUTE_FIELDS}
  shape = dataclasses.replace(shape, **config.model_overrides, **compute)
  if shape.num_experts:
    shape = dataclasses.replace(shape, moe=moe.form_of(shape.moe))
  if shape.vocab_size == 0:
    return dataclasses.replace(shape, vocab_size=vocab_size)
  if shape.vocab_size < vocab_size:
    raise ValueError(
        f"The tokenizer has {vocab_size} ids and the model's vocabulary "
        f"{shape.vocab_size}. Set model_overrides.vocab_size=0 to take the "
        "tokenizer's, or name the model's own tokenizer.")
  return shape


def _shape(
    config: config_dict.ConfigDict, workdir: workdir_lib.Workdir | None,
) -> ModelConfig:
  """Reads the shape that `init` names, or the workdir's copy of it.

  Raises:
    ValueError: there is none, or the file is damaged.
  """
  kept = [workdir.path] if workdir else []
  for folder in (*kept, *_folders(config)):
    if (folder / SHAPE).exists():
      found = workdir_lib.read_object(folder / SHAPE)
      try:
        return ModelConfig.from_json(found)
      except (ValueError, TypeError) as error:
        raise workdir_lib.damaged(folder / SHAPE, str(error)) from error
  if config.init.kind == "preset":
    return released.model_config(published(config))
  raise ValueError(
      'The config names no model (model=""), and its init brings none: there '
      f"is no {SHAPE} in or above init.path={config.init.path!r}. Set model "
      "to a preset.")


def _folders(config: config_dict.ConfigDict) -> Iterator[pathlib.Path]:
  """Yields `init.path` and its parents.

  The path may be `<workdir>/<stage>/checkpoints/<step>`, and the shape and the
  tokenizer are in the workdir.
  """
  if config.init.kind in ("workdir", "directory"):
    path = pathlib.Path(config.init.path).absolute()
    yield from (path, *path.parents[:3])


def tokenizer(
    config: config_dict.ConfigDict, workdir: workdir_lib.Workdir | None,
) -> tokenizer_lib.Tokenizer:
  """Loads the run's tokenizer: the workdir's copy if there is one.

  Without a copy it is made or loaded as the config says, and copied.

  Raises:
    ValueError: the config names no tokenizer and `init` brings none.
    WorkdirError: a file of the copy has changed since it was written.
  """
  kept = workdir.path / "tokenizer" if workdir else None
  if kept and kept.exists():
    # Before it is used: other vocabularies would train on other tokens
    # silently.
    _check_sums(kept)
    return tokenizer_lib.load(kept)
  found = _make_tokenizer(config)
  if workdir and workdir.is_writer:
    # Renamed when complete: a kill in between must not leave half of one.
    partial = workdir.path / "tokenizer.partial"
    found.save(partial)
    (partial / SUMS).write_text("".join(
        f"{digest}  {name}\n" for name, digest in _sums(partial).items()))
    partial.replace(workdir.path / "tokenizer")
  return found


def _sums(directory: pathlib.Path) -> dict[str, str]:
  """Returns the sha256 of each file, by name."""
  return {file.name: hashlib.sha256(file.read_bytes()).hexdigest()
          for file in sorted(directory.iterdir()) if file.name != SUMS}


def _check_sums(directory: pathlib.Path) -> None:
  """Raises WorkdirError if a file has changed since it was written.

  A vocabulary that was truncated may still load, as another vocabulary.
  """
  file = directory / SUMS
  if not file.exists():
    return
  text, found = workdir_lib.read_text(file), _sums(directory)
  for line in text.splitlines(keepends=True):
    digest, _, name = line.rstrip("\n").partition("  ")
    if len(digest) != 64 or not name or not line.endswith("\n"):
      raise workdir_lib.damaged(file, f"found {line[:40]!r}")
    if found.get(name) != digest:
      what = f"its checksum is not that of {file}" if name in found else (
          "it is missing")
      raise workdir_lib.WorkdirError(
          f"{directory / name} is damaged: {what}. Put a copy back; or remove "
          f"all of {directory}, and it is made again as the config says.")


def _make_tokenizer(
    config: config_dict.ConfigDict) -> tokenizer_lib.Tokenizer:
  section = config.tokenizer
  if section.path:
    return tokenizer_lib.load(section.path)
  if section.train:
    return vocabulary.train_sentencepiece(
        loading.load_function(section.train)(),
        model_type=section.model_type, vocab_size=section.vocab_size,
        symbols=section.symbols)
  if config.init.kind == "preset":
    return released.tokenizer(published(config))
  for folder in _folders(config):
    if (folder / "tokenizer").is_dir():
      return tokenizer_lib.load(folder / "tokenizer")
  raise ValueError(
      "The config names no tokenizer, and its init brings none. Set "
      "tokenizer.path or tokenizer.train.")


def published(config: config_dict.ConfigDict) -> released.Release:
  if config.init.path:
    return released.read(config.init.path)
  if config.model not in PUBLISHED:
    raise ValueError(
        f"The published files of {config.model} are not found by themselves; "
        f"those of {', '.join(PUBLISHED)} are. Set init.path to their "
        "directory (config.json, *.safetensors and the tokenizer's files) or "
        "GGUF file.")
  return PUBLISHED[config.model]()


def initial(
    config: config_dict.ConfigDict, model: ModelConfig,
    renderer_hash: str | None = None,
) -> Transformer:
  """Loads the weights that the first stage starts from: float32, on the mesh.

  Args:
    renderer_hash: the hash of tokenizer and chat template that a checkpoint
      must have been trained with; None: any.

  Raises:
    ValueError: the checkpoint does not fit the config.
    WorkdirError: there is no such run, or the stage has not finished.
  """
  init = config.init
  if init.kind == "random":
    return transformer.init(model, config.seed)
  if init.kind == "preset":
    return released.load(published(config), model)
  if init.kind == "workdir":
    workdir = workdir_lib.open_existing(init.path)
    stage = init.stage or trained_stage(workdir, "")
    if workdir.finished(stage) is None:
      raise workdir_lib.WorkdirError(
          f"init.stage={stage!r} has not finished in {workdir.path}. Name one "
          "that has, or one of its checkpoints with init.kind='directory'.")
    return of_stage(model, workdir, stage, renderer_hash)
  return of_directory(model, init.path, renderer_hash)


def trained_stage(workdir: workdir_lib.Workdir, stage: str) -> str:
  """Finds a stage with a checkpoint: the one asked for, or the last finished.

  Raises:
    ValueError: there is none.
  """
  stages = workdir.config().stages
  trained = [name for name in stages if workdir.checkpoints(name).exists()]
  finished = [name for name in trained if workdir.finished(name)]
  if stage in trained or (not stage and finished):
    return stage or finished[-1]
  what = f"stage {stage!r}" if stage else "finished training stage"
  raise ValueError(
      f"{workdir.path} holds no checkpoint of a {what}; it has those of "
      f"{', '.join(trained) or 'none'}. Set --stage (init.stage in a config) "
      "to one of them, or --stage to init.")


def of_stage(
    model: ModelConfig, workdir: workdir_lib.Workdir, stage: str,
    renderer_hash: str | None = None,
) -> Transformer:
  """Loads the last checkpoint of a stage; see `of_directory`."""
  return _restore(model, workdir.checkpoints(stage), None, renderer_hash)


def of_directory(
    model: ModelConfig, path: str, renderer_hash: str | None = None,
) -> Transformer:
  """Loads one checkpoint, `<...>/checkpoints/<step>`, or a folder's last.

  The folder is `checkpoints`, or what `posttrain import` has made.

  Args:
    renderer_hash: as in `initial`.

  Returns:
    The model on the mesh as it was trained: adapters not merged, and frozen
    weights in the dtype in which they were at rest.

  Raises:
    FileNotFoundError: there is no checkpoint, or not what was frozen in it.
    ValueError: it is of another shape, tokenizer or chat template.
  """
  directory = pathlib.Path(path)
  if (directory / "checkpoints").is_dir():
    directory /= "checkpoints"
  if directory.name.isdecimal():
    return _restore(
        model, directory.parent, int(directory.name), renderer_hash)
  return _restore(model, directory, None, renderer_hash)


def _restore(
    model: ModelConfig, directory: pathlib.Path, step: int | None,
    renderer_hash: str | None,
) -> Transformer:
  extras = checkpoints.read_extras(directory, step)
  # An imported release was trained by others, with a template of theirs.
  if None not in (renderer_hash, extras["renderer_hash"]) and (
      renderer_hash != extras["renderer_hash"]):
    raise ValueError(
        f"The weights in {directory} were trained with another tokenizer or "
        "chat template than this config's. Set chat_template and tokenizer "
        "to theirs, or train on the new ones first, by supervised "
        "fine-tuning.")
  # What was imported was not trained, and says nothing of it.
  # An imported release has no plan of trainable parameters.
  plan = trainable.Plan.from_json(
      extras.get("plan", trainable.Plan().to_json()))
  trained, frozen = trainable.split(*trainable.abstract(model, plan))
  restored = checkpoints.restore(
      directory, {"model": on_mesh(state.to_dict(trained))}, step)
  # The trained part is in every checkpoint, the frozen one once in the workdir.
  trained = state.from_dict(trained, restored.tree["model"])
  if extras.get("frozen"):
    frozen = _restore_frozen(directory, extras["frozen"], frozen)
  return trainable.join(trained, frozen)


def _restore_frozen(
    directory: pathlib.Path, name: str, like: Transformer) -> Transformer:
  """Loads the frozen weights that a checkpoint was trained with.

  Args:
    directory: the checkpoint's folder, `<workdir>/<stage>/checkpoints`.
    name: their hash, from the checkpoint.
    like: the model's frozen part, abstract.
  """
  kept = directory.parent.parent / FROZEN / name
  if not kept.exists():
    raise FileNotFoundError(
        f"{directory} holds trained weights only; the frozen ones are kept in "
        f"{kept}, which does not exist. Copy a whole workdir, or at least "
        "that folder with the checkpoints.")
  tree = checkpoints.restore(kept, on_mesh(state.to_dict(like))).tree
  return state.from_dict(like, tree)


def frozen_name(frozen: Transformer) -> str:
  """Hashes the weights that a stage does not train; "" if it trains all."""
  names = trainable.paths(frozen)
  if not names:
    return ""
  prints = fingerprint.of(
      dict(zip(names, jax.tree.leaves(frozen), strict=True)))
  text = json.dumps(prints, sort_keys=True)
  return hashlib.sha256(text.encode()).hexdigest()[:16]


def save_frozen(frozen: Transformer, workdir: workdir_lib.Workdir) -> str:
  """Saves frozen weights in the workdir, unless it has them; returns their
  name.
  """
  name = frozen_name(frozen)
  if not name:
    return name
  directory = workdir.path / FROZEN / name
  if not sharding.of_first_host(np.array((directory / "0").exists())):
    with checkpoints.Checkpoints(directory, keep=1) as saver:
      saver.save(0, state.to_dict(frozen), {})
  return name


def on_mesh(tree: Any) -> Any:
  """Gives abstract arrays the shardings of the current, concrete mesh."""
  mesh = jax.sharding.get_mesh()
  return jax.tree.map(lambda x: sharding.on_mesh(x, mesh), tree)


def make_renderer(
    config: config_dict.ConfigDict, tokenizer: tokenizer_lib.Tokenizer,
) -> render.Renderer:
  """Makes the renderer of a config, for a tokenizer.

  Raises:
    ValueError: as `render.make_renderer`.
  """
  return render.make_renderer(
      tokenizer, config.chat_template, thinking.Thinking(**config.thinking))


def load_for_sampling(
    config: config_dict.ConfigDict, path: str | None, stage: str,
) -> tuple[render.Renderer, Transformer]:
  """Loads the renderer, and the weights that were trained with it."""
  workdir = workdir_lib.open_existing(
      path, is_writer=False) if path else None
  found = tokenizer(config, workdir)
  renderer = make_renderer(config, found)
  shape = model_config(config, found.vocab_size, workdir)
  if workdir is None or stage == "init":
    return renderer, initial(config, shape, renderer.hash)
  return renderer, of_stage(
      shape, workdir, trained_stage(workdir, stage), renderer.hash)
