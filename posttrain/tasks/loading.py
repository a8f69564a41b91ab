"""Loads problem sources, rewards and answer extractors by name.

A name is `module:function` ("posttrain.tasks.signs:reward") or
`file.py:function` ("my_task.py:reward", relative to the working directory). A
file is executed once per process, even if several of its functions are used.
"""

import difflib
import hashlib
import importlib
import importlib.util
import inspect
import reprlib
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any


def load_function(name: str) -> Callable[..., Any]:
  """Imports the function, or another callable, that a name stands for.

  Raises:
    ValueError: as `load`, or what is named is not callable.
  """
  function, (place, attribute) = load(name), _split(name)
  if not callable(function):
    raise ValueError(
        f"{name!r} is a {type(function).__name__}, and a function is needed."
        + _suggest(attribute, _public_callables(_load_module(place, name))))
  return function


def load(name: str, what: str = "function") -> Any:
  """Imports the object that a name stands for.

  Args:
    name: "module:function" or "file.py:function".
    what: the name should stand for, in a message.

  Raises:
    ValueError: the name has another form, or there is no such module, file or
      function. An exception raised by the module's own code passes through
      unchanged.
  """
  place, attribute = _split(name)
  module = _load_module(place, name)
  if not hasattr(module, attribute):
    raise ValueError(
        f"{name!r}: {place} has no {what} {attribute!r}."
        + _suggest(attribute, _public_callables(module)))
  return getattr(module, attribute)


def check_call(name: str, *args: Any, **kwargs: Any) -> None:
  """Raises ValueError if a function does not take these arguments.

  It is not called. An argument must have its parameter's type, if that is int,
  float, str or bool. Raises as `load_function` does, too.
  """
  signature = inspect.signature(load_function(name))
  try:
    bound = signature.bind(*args, **kwargs)
  except TypeError as error:
    given = ", ".join([*map(reprlib.repr, args), *(
        f"{key}={reprlib.repr(value)}" for key, value in kwargs.items())])
    raise ValueError(
        f"{name} does not take ({given}): {error}. It has the parameters "
        f"{', '.join(signature.parameters)}.") from error
  for key, value in bound.arguments.items():
    parameter = signature.parameters[key]
    kind = parameter.annotation
    if kind in _PLAIN and type(value) not in _PLAIN[kind] and (
        parameter.kind not in (parameter.VAR_POSITIONAL,
                               parameter.VAR_KEYWORD)):
      raise ValueError(
          f"{name} takes {key} as {kind.__name__}, and found "
          f"{reprlib.repr(value)}, a {type(value).__name__}.")


# Annotations that are checked, and the types of values; a float may be written
# as 1.
_PLAIN = {int: (int,), float: (int, float), str: (str,), bool: (bool,)}


def source_hash(name: str) -> str:
  """Computes the sha256, as hex, of the file that defines the function.

  Only that file: what it imports is not in the hash.

  Raises:
    ValueError: as `load_function`, or the module has no source file.
  """
  place, _ = _split(name)
  if not place.endswith(".py"):
    file = getattr(_load_module(place, name), "__file__", None)
    if file is None:
      raise ValueError(
          f"{name!r}: {place} has no source file, so what the numbers of a "
          "run depend on cannot be recorded. Name a function of a module or "
          "a file of yours.")
    place = file
  path = Path(place)
  _require_file(path, name)
  return hashlib.sha256(path.read_bytes()).hexdigest()


def _split(name: str) -> tuple[str, str]:
  place, colon, attribute = name.rpartition(":")
  if not (colon and place and attribute.isidentifier()):
    raise ValueError(
        f"{name!r} names no function. Write it as module:function "
        '("posttrain.tasks.signs:reward") or file.py:function '
        '("my_task.py:reward").')
  return place, attribute


def _load_module(place: str, name: str) -> ModuleType:
  if place.endswith(".py"):
    return _load_file(Path(place), name)
  try:
    return importlib.import_module(place)
  except ModuleNotFoundError as error:
    # A module that exists but imports a missing one is a different fault.
    parents = [place.rsplit(".", n)[0] for n in range(place.count(".") + 1)]
    if error.name not in parents:
      raise
    raise ValueError(
        f"{name!r}: there is no module {error.name!r}. A file needs its "
        "ending, as in my_task.py:reward."
        + _suggest(place, _sibling_modules(place))) from error


def _load_file(path: Path, name: str) -> ModuleType:
  _require_file(path, name)
  path = path.resolve()
  # The path is in the key, since two folders may each hold a rewards.py.
  digest = hashlib.sha256(str(path).encode()).hexdigest()[:8]
  key = f"_posttrain_file_{path.stem}_{digest}"
  if key not in sys.modules:
    spec = importlib.util.spec_from_file_location(key, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[key] = module  # Before it runs: dataclasses look it up.
    try:
      spec.loader.exec_module(module)
    except BaseException as error:
      del sys.modules[key]
      if isinstance(error, SyntaxError):  # Nothing ran: nothing to trace.
        raise ValueError(
            f"{name!r}: {path}, line {error.lineno}: {error.msg}.") from error
      raise
  return sys.modules[key]


def _require_file(path: Path, name: str) -> None:
  if not path.is_file():
    raise ValueError(
        f"{name!r}: there is no file {path.absolute()}. Give its path "
        "absolute or relative to the working directory.")


def _public_callables(module: ModuleType) -> list[str]:
  return [key for key, value in vars(module).items()
          if callable(value) and not key.startswith("_")]


def _sibling_modules(place: str) -> list[str]:
  """Lists modules near a missing one, for the suggestion."""
  package = sys.modules.get(place.rpartition(".")[0])
  return [f"{package.__name__}.{file.stem}"
          for folder in getattr(package, "__path__", ())
          for file in sorted(Path(folder).glob("*.py"))
          if package is not None and file.stem != "__init__"]


def _suggest(found: str, names: list[str]) -> str:
  nearest = difflib.get_close_matches(found, names, n=1)
  return f" Nearest: {nearest[0]!r}." if nearest else ""
