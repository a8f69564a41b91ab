"""Checkpoints of a stage, through Orbax: asynchronous, checked, all or nothing.

A checkpoint is a directory named by its step, with three items:

  state     a nested dict of arrays (parameters, optimizer, step), each host
            writing and reading its own shards. Paths are plain dict keys, so
            that no file depends on a library's classes.
  extras    JSON: the data iterator's state, seed, hashes.
  rollouts  optional: a dict of NumPy arrays, RL rollouts in flight.

Orbax writes under a temporary name and renames when all hosts are done, so a
checkpoint with its final name is complete. Its array files carry no checksum.
So a fingerprint of every array is computed on the devices when saving, and
again after restoring: a damaged file is an error, never a slightly wrong model.
"""

import dataclasses
import io
import json
import zlib
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from flax import traverse_util
from orbax.checkpoint import checkpoint_managers

from posttrain import sharding
from posttrain.train import checkpoint_integrity, fingerprint

Tree = Mapping[str, Any]  # Nested dict with string keys; leaves are arrays.


@dataclasses.dataclass(frozen=True)
class Restored:
  """Contents of a checkpoint; `tree` holds the arrays that were asked for."""

  step: int
  tree: dict[str, Any]
  extras: dict[str, Any]
  rollouts: dict[str, np.ndarray] | None


class Checkpoints:
  """Checkpoints of one stage; a context manager.

  Every process makes the same calls in the same order. Leaving the context
  waits for a save in flight.
  """

  def __init__(
      self, directory: epath.PathLike, *, keep: int, keep_best: int = 0,
      best_metric: str = "", best_mode: str = "max",
  ):
    """Opens or makes the directory, and removes what a kill left half-written.

    Args:
      directory: shared by all hosts.
      keep: number of the latest checkpoints that stay, at least one.
      keep_best: number of the best checkpoints that stay in addition.
      best_metric: the metric that ranks; needed with `keep_best`.
      best_mode: "max" or "min".

    Raises:
      ValueError: an argument is out of range; names its config key.
    """
    if keep < 1:
      raise ValueError(
          f"checkpoint.keep is {keep}, and resuming needs at least 1.")
    if keep_best and not best_metric:
      raise ValueError(
          f"checkpoint.keep_best is {keep_best}, which needs the name of a "
          "metric in checkpoint.best_metric.")
    checkpoint_integrity.say_errors_once()
    self._directory = _absolute(directory)
    self._best_metric = best_metric if keep_best else ""
    # The ranking metric is saved under one name, so that reading needs no
    # config.
    value = lambda metrics: metrics["value"]
    policies: list[Any] = [checkpoint_managers.LatestN(keep)]
    if keep_best:
      policies.append(checkpoint_managers.BestN(
          get_metric_fn=value, reverse=best_mode == "min",
          n=keep_best, keep_checkpoints_without_metrics=False))
    options = ocp.CheckpointManagerOptions(
        preservation_policy=checkpoint_managers.AnyPreservationPolicy(
            policies),
        best_fn=value if keep_best else None, best_mode=best_mode,
        cleanup_tmp_directories=True)
    with checkpoint_integrity.errors_name(self._directory, "opened"):
      self._manager = _Manager(
          self._directory, item_handlers={
              "state": ocp.PyTreeCheckpointHandler(),
              "extras": ocp.JsonCheckpointHandler(),
              "rollouts": ocp.PyTreeCheckpointHandler()},
          options=options)

  def latest_step(self) -> int | None:
    """Returns the step of the newest whole checkpoint, or None."""
    return self._manager.latest_step()

  def steps(self) -> list[int]:
    """Lists the steps of all whole checkpoints, ascending."""
    return sorted(self._manager.all_steps())

  def best_step(self) -> int | None:
    """Returns the step that is best by `best_metric`; None without one."""
    return self._manager.best_step() if self._best_metric else None

  def save(
      self, step: int, tree: Tree, extras: Mapping[str, Any], *,
      rollouts: Mapping[str, np.ndarray] | None = None,
      metrics: Mapping[str, float] | None = None,
  ) -> None:
    """Copies the state to the host and returns; a thread writes it.

    The arrays may be donated right after. A step that is already saved is left
    as it is.

    Args:
      step: number of optimizer updates made.
      tree: nested dict of global arrays.
      extras: JSON-able.
      rollouts: flat dict of NumPy arrays, the same on every host.
      metrics: `best_metric` must be among them if checkpoints are ranked;
        None, or a value that is not finite, saves one that is kept as a
        recent one only.

    Raises:
      ValueError: `tree` is not a dict of arrays, or the metric is missing.
      StorageError: this save, or the one before, could not be written.
    """
    # An error of the save before is raised here, with its own path, and at most
    # one copy of the state waits in the host's memory.
    self.wait()
    # A preemption may fall on a step that was just saved.
    if step in self._manager.all_steps():
      return
    tree = _plain(tree)
    ranking = self._ranking(metrics)
    # Kept as a string, so that its checksum is of the very bytes: Orbax may
    # format JSON in another way.
    body = json.dumps(dict(extras), sort_keys=True, allow_nan=False)
    items = {
        "state": ocp.args.PyTreeSave(tree),
        "extras": ocp.args.JsonSave({
            "extras": body, "fingerprints": fingerprint.of(_flatten(tree)),
            "extras_crc32": zlib.crc32(body.encode()),
            "has_rollouts": rollouts is not None})}
    if rollouts is not None:
      items["rollouts"] = ocp.args.PyTreeSave({"npz": _pack(rollouts)})
    with checkpoint_integrity.errors_name(
        self._directory / str(step), "written"):
      self._manager.save(
          step, args=ocp.args.Composite(**items), force=True,
          metrics=ranking)

  def _ranking(self, metrics: Mapping[str, float] | None) -> dict | None:
    if not self._best_metric or metrics is None:
      return None
    if self._best_metric not in metrics:
      raise ValueError(
          f"checkpoint.best_metric is {self._best_metric!r}, which is not "
          f"among the metrics of this step: {sorted(metrics)}. Choose one of "
          "them, or a checkpoint.every at whose steps it is measured.")
    value = float(metrics[self._best_metric])
    # Orbax sorts by it, and a NaN of a skipped update has no place in an order.
    return {"value": value} if np.isfinite(value) else None

  def restore(self, abstract: Tree, step: int | None = None) -> Restored:
    """Restores from this stage, as the function `restore`."""
    self.wait()
    return restore(self._directory, abstract, step)

  def wait(self) -> None:
    """Waits until the save in flight is complete.

    Raises:
      StorageError: it could not be written.
    """
    with checkpoint_integrity.errors_name(self._directory, "written"):
      self._manager.wait_until_finished()

  def set_aside(self, step: int) -> epath.Path:
    """Moves a checkpoint to the folder `damaged`; returns its new path."""
    target = self._directory.parent / "damaged" / str(step)
    if jax.process_index() == 0:
      target.parent.mkdir(parents=True, exist_ok=True)
      if target.exists():
        target.rmtree()
      (self._directory / str(step)).rename(target)
    sharding.of_first_host(np.array(True))  # A barrier: all list it after.
    # Orbax keeps a list of steps, which still has the moved one.
    self._manager.reload()
    return target

  def close(self) -> None:
    with checkpoint_integrity.errors_name(self._directory, "written"):
      self._manager.close()

  def __enter__(self) -> "Checkpoints":
    return self

  def __exit__(self, *_: object) -> None:
    self.close()


def abstract(tree: Tree) -> dict[str, Any]:
  """Describes a tree of arrays: shapes, dtypes and shardings to restore into.
  """
  return jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding),
      _plain(tree))


def restore(
    directory: epath.PathLike, abstract: Tree, step: int | None = None,
) -> Restored:
  """Reads a checkpoint into the shardings of `abstract`.

  The mesh may differ from the one that saved. `abstract` may be a part of
  what was saved, for instance `{"model": ...}` alone.

  Args:
    directory: a stage's folder of checkpoints.
    abstract: nested dict of `jax.ShapeDtypeStruct` with shardings.
    step: the checkpoint's step; the latest by default.

  Raises:
    FileNotFoundError: no such checkpoint; names those that exist.
    ValueError: an array is missing or has another shape or dtype.
    DamagedError: a file is damaged or missing; names the path.
  """
  directory = _absolute(directory)
  step = find_step(directory, step)
  path = directory / str(step)
  abstract = _plain(abstract)
  # Orbax's handlers rather than its manager: the manager waits for the other
  # hosts after reading, and would wait for ever if one of them found damage.
  handler = ocp.PyTreeCheckpointHandler()
  with checkpoint_integrity.on_every_host(path):
    saved = _flatten(handler.metadata(path / "state").tree)
  # Before the arrays are read, for an error that names the array and what to
  # change.
  _check_structure(path / "state", saved, _flatten(abstract))
  rollouts = None
  with checkpoint_integrity.on_every_host(path):
    tree = handler.restore(path / "state", args=ocp.args.PyTreeRestore(
        item=abstract, partial_restore=True,
        restore_args=jax.tree.map(lambda x: ocp.ArrayRestoreArgs(
            sharding=x.sharding, global_shape=x.shape, dtype=x.dtype),
            abstract)))
    extras, found = _read_extras(path)
    # Checkpoints of version 0.1.0 do not record if they had rollouts. Where it
    # is recorded, a folder that is missing is damage.
    if found.get("has_rollouts", (path / "rollouts").exists()):
      rollouts = _unpack(handler.restore(path / "rollouts")["npz"])
  _check_fingerprints(
      path / "state", fingerprint.of(_flatten(tree)), found["fingerprints"])
  return Restored(step, tree, extras, rollouts)


def read_extras(
    directory: epath.PathLike, step: int | None = None,
) -> dict[str, Any]:
  """Reads the JSON part alone, without a device; raises as `restore` does."""
  directory = _absolute(directory)
  path = directory / str(find_step(directory, step))
  with checkpoint_integrity.errors_name(path / "extras", "read"):
    return _read_extras(path)[0]


def find_step(directory: epath.PathLike, step: int | None = None) -> int:
  """Finds the latest whole checkpoint, or checks that `step` is one."""
  directory = _absolute(directory)
  if not directory.exists():
    raise FileNotFoundError(
        f"{directory} does not exist; a finished or interrupted training "
        "stage has its checkpoints there.")
  steps = sorted(ocp.path.step.checkpoint_steps(directory))
  if not steps:
    raise FileNotFoundError(f"{directory} holds no whole checkpoint.")
  if step is not None and step not in steps:
    raise FileNotFoundError(
        f"{directory} holds no checkpoint of step {step}; it has {steps}.")
  return steps[-1] if step is None else step


def check_same(restored: Restored, **expected: Any) -> None:
  """Compares extras, such as hashes, with those of this run.

  Raises:
    ValueError: one differs; names it, both values and the step.
  """
  for name, value in expected.items():
    if restored.extras.get(name) != value:
      raise ValueError(
          f"The checkpoint of step {restored.step} was made with {name}="
          f"{restored.extras.get(name)!r}, and this run has {value!r}. Use "
          "the config and files that it was made with, or a new workdir.")


class _Manager(ocp.CheckpointManager):
  """Orbax's manager, without its preemption; see `train/preemption.py`.

  Orbax asks JAX's preemption service, which is off (`distributed.py`): the
  hosts would otherwise agree on a step in two ways.
  """

  def reached_preemption(self, step: int) -> bool:
    del step
    return False


def _absolute(directory: epath.PathLike) -> epath.Path:
  return epath.Path(directory).absolute()


def _plain(tree: Any, path: str = "") -> dict[str, Any]:
  """Checks that the tree is nested dicts of arrays, and copies it as such.

  Orbax would save other pytrees too, under paths that depend on their classes.
  """
  if not isinstance(tree, Mapping):
    raise ValueError(
        f"Checkpoint state at {path or 'the top'} is a {type(tree).__name__}; "
        "it needs nested dicts with arrays at the leaves.")
  plain: dict[str, Any] = {}
  for name, value in tree.items():
    here = f"{path}/{name}" if path else str(name)
    if not isinstance(name, str) or "/" in name:
      raise ValueError(
          f"Checkpoint state has the key {name!r} at {here}; keys are strings "
          "without a slash.")
    is_array = isinstance(value, jax.Array | jax.ShapeDtypeStruct)
    plain[name] = value if is_array else _plain(value, here)
  return plain


def _flatten(tree: Mapping[str, Any]) -> dict[str, Any]:
  """Flattens nested dicts to leaves by slash-separated path, sorted."""
  return dict(sorted(traverse_util.flatten_dict(tree, sep="/").items()))


def _check_structure(
    path: epath.Path, saved: Mapping[str, Any], wanted: Mapping[str, Any],
) -> None:
  for name, want in wanted.items():
    if name not in saved:
      raise ValueError(
          f"{path} has no array {name!r}. The model or optimizer of this "
          "config differs from the one that was saved; in the checkpoint "
          f"are {', '.join(list(saved)[:8])}, ...")
    have = saved[name]
    if tuple(have.shape) != want.shape or have.dtype != want.dtype:
      raise ValueError(
          f"{path}: {name!r} is {have.dtype}{list(have.shape)} there and "
          f"{want.dtype}{list(want.shape)} in this run. Use the model config "
          "that the checkpoint was made with.")


def _check_fingerprints(
    path: epath.Path, found: Mapping[str, int], expected: Mapping[str, int],
) -> None:
  bad = [name for name in found if found[name] != expected.get(name)]
  if bad:
    raise checkpoint_integrity.damaged(
        path, f"array {bad[0]!r} is not what was saved "
        f"({len(bad)} of {len(found)} arrays differ)")


def _read_extras(path: epath.Path) -> tuple[dict[str, Any], dict[str, Any]]:
  """Reads the JSON part of a checkpoint, and the rest of its file."""
  found = json.loads((path / "extras" / "metadata").read_text())
  body = found["extras"]
  if zlib.crc32(body.encode()) != found["extras_crc32"]:
    raise ValueError(f"{path / 'extras'}: its checksum differs")
  return json.loads(body), found


def _pack(rollouts: Mapping[str, np.ndarray]) -> np.ndarray:
  """Packs rollouts into one byte array: an .npz, whose zip has checksums.

  It keeps arrays of any dtype, and empty ones.
  """
  buffer = io.BytesIO()
  np.savez(buffer, allow_pickle=False, **rollouts)  # type: ignore[arg-type]
  return np.frombuffer(buffer.getvalue(), np.uint8)


def _unpack(npz: np.ndarray) -> dict[str, np.ndarray]:
  with np.load(io.BytesIO(np.asarray(npz).tobytes())) as archive:
    return {name: archive[name] for name in archive.files}
