"""Imports published weights, and exports trained ones: `import` and `export`.

  posttrain import   a release -> <output>/model.json, tokenizer/, checkpoints/
  posttrain export   a checkpoint or a release -> what transformers loads

Both write under a temporary name and rename at the end. On several hosts all
take part, and process 0 writes everything except arrays.
"""

import contextlib
import pathlib
import shutil
from collections.abc import Iterator

import jax
import numpy as np
from ml_collections import config_dict

from posttrain import sharding, weights
from posttrain import workdir as workdir_lib
from posttrain.interop import hugging_face, peft_adapter, released
from posttrain.interop.parameters import Progress
from posttrain.model import lora
from posttrain.model.transformer import Transformer
from posttrain.telemetry import console as console_lib
from posttrain.text.tokenizer import Tokenizer
from posttrain.train import checkpoints, state


def import_release(config: config_dict.ConfigDict, output: str) -> None:
  """Imports a release as a checkpoint that `init.kind="directory"` can name.

  Its arrays are float32 and can be read into any mesh, each host its part. The
  checkpoint may be used with any chat template, as nothing records which one
  the release was trained with.

  Args:
    config: resolved; `init` is of the kind "preset".
    output: the directory, which must not exist.

  Raises:
    ValueError: the directory exists, or the release cannot be read.
  """
  path = _new(output)
  partial = path.with_name(f".{path.name}.partial")
  first = jax.process_index() == 0
  console = console_lib.Console(quiet=not first)
  with jax.set_mesh(sharding.mesh_of(config.mesh)):
    files = weights.published(config)
    tokenizer = released.tokenizer(files)
    shape = weights.model_config(config, tokenizer.vocab_size)
    with _progress(console, "import: tensors") as progress:
      model = released.load(files, shape, progress=progress)
    if first:
      shutil.rmtree(partial, ignore_errors=True)  # Left by a killed import.
      tokenizer.save(partial / "tokenizer")
    workdir_lib.Workdir(partial, is_writer=first).write_json(
        weights.SHAPE, shape.to_json())
    with checkpoints.Checkpoints(partial / "checkpoints", keep=1) as saver:
      saver.save(0, {"model": state.to_dict(model)}, {"renderer_hash": None})
    if first:
      partial.rename(path)
  console.line(
      f'{path}: {shape.num_parameters:,} parameters. Use init.kind="directory" '
      f'and init.path={str(path)!r}, with model="".')


def export(
    config: config_dict.ConfigDict, output: str, *,
    workdir: str | None = None, stage: str = "", step: int | None = None,
    dtype: str = "float32", shard_bytes: int = hugging_face.SHARD_BYTES,
    adapter_of: str = "",
) -> None:
  """Exports a directory that transformers loads, or adapters that `peft` loads.

  Args:
    config: resolved; the workdir's own if there is a workdir.
    output: the directory, which must not exist.
    workdir: export the weights of a stage of this run; without a workdir,
      the weights that `config.init` names.
    stage: name of the stage; "" for the last finished training stage, "init"
      for the weights that the run started from.
    step: one of the stage's checkpoints; the last by default.
    dtype, shard_bytes: see `hugging_face.save`.
    adapter_of: write the LoRA adapters alone, for `peft`: the name or
      directory of the base model, which `peft` loads under them. "": merge the
      adapters and write a whole model.

  Raises:
    ValueError: the directory exists, no family of transformers computes the
      model, or it has no adapters and they were asked for.
    FileNotFoundError: there is no such checkpoint.
  """
  path = _new(output)
  console = console_lib.Console(quiet=jax.process_index() != 0)
  with jax.set_mesh(sharding.mesh_of(config.mesh)):
    model, tokenizer = _source(config, workdir, stage, step)
    if adapter_of:
      peft_adapter.save(model, path, adapter_of)
      console.line(f"{path}: the adapters. peft.PeftModel loads them.")
      return
    if model.config.lora is not None or model.config.quantized:
      model = lora.merged(model)
    with _progress(console, "export: tensors") as progress:
      hugging_face.save(
          model, path, tokenizer=tokenizer, dtype=dtype,
          shard_bytes=shard_bytes, progress=progress)
  console.line(
      f"{path}: {model.config.num_parameters:,} parameters in {dtype}. "
      "transformers.AutoModelForCausalLM and AutoTokenizer load it.")


def _source(
    config: config_dict.ConfigDict, path: str | None, stage: str,
    step: int | None,
) -> tuple[Transformer, Tokenizer]:
  workdir = workdir_lib.open_existing(
      path, is_writer=False) if path else None
  tokenizer = weights.tokenizer(config, workdir)
  shape = weights.model_config(config, tokenizer.vocab_size, workdir)
  # Raises if no family of transformers fits, before the weights are read,
  # which takes long.
  hugging_face.config_json(shape, tokenizer, "float32")
  if workdir is None or stage == "init":
    return weights.initial(config, shape), tokenizer
  directory = workdir.checkpoints(weights.trained_stage(workdir, stage))
  return weights.of_directory(
      shape, str(directory / str(checkpoints.find_step(directory, step)))
  ), tokenizer


def _new(output: str) -> pathlib.Path:
  """Returns the absolute path of a new directory; raises if it exists."""
  path = pathlib.Path(output).absolute()
  # Process 0's answer: on a network disk the hosts may disagree, and one that
  # raised alone would leave the others in a collective.
  if sharding.of_first_host(np.array(path.exists())):
    raise ValueError(
        f"{path} exists, and is not overwritten. Name a new --output.")
  return path


@contextlib.contextmanager
def _progress(console: console_lib.Console, title: str) -> Iterator[Progress]:
  """Opens a progress line at the first report, which says how many tensors.

  Yields:
    A function of the number of tensors done and of all tensors.
  """
  with contextlib.ExitStack() as stack:
    lines: list[console_lib.Progress] = []

    def report(done: int, total: int) -> None:
      if not lines:
        lines.append(stack.enter_context(console.progress(title, total)))
      lines[0].update(done)

    yield report
