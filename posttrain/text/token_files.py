"""JSON files next to a tokenizer: special tokens, stop ids, chat template.

  tokenizer_config.json   names of BOS, EOS and others, added tokens, template
  chat_template.jinja     the template, in newer releases
  generation_config.json  every id at which generation stops
"""

import contextlib
import json
import pathlib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

# Tokens that a chat template may write by name.
NAMED = ("bos_token", "eos_token", "unk_token", "pad_token")


@contextlib.contextmanager
def errors_name(path: pathlib.Path) -> Iterator[None]:
  """Turns any error of reading a tokenizer's file into one with its path.

  The libraries that read them have no common type of error.
  """
  try:
    yield
  except Exception as error:
    # Raised inside with the path already: do not wrap it twice.
    if type(error) is ValueError and str(path) in str(error):
      raise
    raise ValueError(
        f"{path} cannot be read as a part of a tokenizer: "
        f"{type(error).__name__}: {str(error)[:200]}. The file is damaged or "
        "is something else. Put a copy of it back.") from error


def read(path: pathlib.Path) -> dict:
  """Reads a JSON object; empty if there is no such file."""
  if not path.exists():
    return {}
  with errors_name(path):
    found = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(found, dict):
      raise ValueError("it holds no object")
    return found


def named(config: dict) -> dict[str, str]:
  """Reads the texts of `NAMED`, which may be strings or objects."""
  found = {key: config.get(key) for key in NAMED}
  texts = {key: value["content"] if isinstance(value, dict) else value
           for key, value in found.items()}
  return {key: text for key, text in texts.items() if text is not None}


def stop_ids(directory: pathlib.Path) -> list[int]:
  """Reads `eos_token_id` of generation_config.json: one id, several or none."""
  stops = read(directory / "generation_config.json").get("eos_token_id")
  if stops is None:
    return []
  return [stops] if isinstance(stops, int) else list(stops)


def added_tokens(config: dict) -> dict[int, tuple[str, bool]]:
  """Reads `added_tokens_decoder`: id -> (text, true if it is a control token).
  """
  return {
      int(token): (entry["content"], bool(entry.get("special")))
      for token, entry in config.get("added_tokens_decoder", {}).items()}


def chat_template(directory: pathlib.Path, config: dict) -> str | None:
  """Reads the template of a release.

  Raises:
    ValueError: there are several templates, and none is called "default".
  """
  file = directory / "chat_template.jinja"
  if file.exists():
    with errors_name(file):
      return file.read_text(encoding="utf-8")
  template = config.get("chat_template")
  if isinstance(template, list):  # Several, by name.
    by_name = {entry["name"]: entry["template"] for entry in template}
    if "default" not in by_name:
      raise ValueError(
          f"{directory}/tokenizer_config.json has chat templates "
          f"{', '.join(by_name)} and none called \"default\". Write the one "
          "to use to a file and set chat_template to its path.")
    return by_name["default"]
  return template


def write(directory: pathlib.Path, tokenizer: Any, **config: Any) -> None:
  """Writes the two JSON files of a `Tokenizer`, and its template.

  Args:
    directory: an existing directory.
    tokenizer: a `Tokenizer`.
    config: further entries of tokenizer_config.json.
  """
  write_json(directory / "tokenizer_config.json", {
      **tokenizer.named, "add_bos_token": tokenizer.bos_id is not None,
      **config})
  write_json(
      directory / "generation_config.json",
      {"eos_token_id": list(tokenizer.stop_ids)})
  if tokenizer.chat_template is not None:
    (directory / "chat_template.jinja").write_text(
        tokenizer.chat_template, encoding="utf-8")


def splitter(words: Iterable[str]) -> Callable[[str], list[str]]:
  """Makes a function that splits a text around `words`, and keeps them."""
  # A regular expression takes the first alternative that fits, not the longest.
  longest_first = sorted(words, key=len, reverse=True)
  if not longest_first:
    return lambda text: [text]
  pattern = re.compile(f"({'|'.join(map(re.escape, longest_first))})")
  return lambda text: [part for part in pattern.split(text) if part]


def write_json(path: pathlib.Path, contents: Mapping[str, Any]) -> None:
  """Writes an indented JSON object."""
  path.write_text(json.dumps(contents, indent=2) + "\n", encoding="utf-8")
