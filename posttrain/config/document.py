"""Makes the table of keys in docs/configs.md from the schema.

  python -m posttrain.config.document docs/configs.md

replaces what stands between the two markers of that file.
"""

import pathlib
import sys
from collections.abc import Iterator
from typing import Any

from posttrain.config import keys, schema, stages

BEGIN = "<!-- keys: made by `python -m posttrain.config.document` -->"
END = "<!-- end of keys -->"


def markdown() -> str:
  """Writes all keys, a table per kind of section."""
  parts = []
  titles = {"Top level": schema.TOP, **{
      f"Stages of kind `{kind}`": stages.schema_of(kind).keys
      for kind in stages.KINDS}}
  for title, section in titles.items():
    rows = "\n".join(_rows(section, ""))
    parts.append(
        f"### {title}\n\n{section.doc}\n\n"
        f"| key | default | meaning |\n|---|---|---|\n{rows}\n")
  return "\n".join(parts)


def insert(text: str) -> str:
  """Replaces the table of a page.

  Raises:
    ValueError: the page lacks a marker.
  """
  before, begin, rest = text.partition(BEGIN)
  _, end, after = rest.partition(END)
  if not begin or not end:
    raise ValueError(f"the page needs the lines {BEGIN!r} and {END!r}.")
  return f"{before}{BEGIN}\n\n{markdown()}\n{END}{after}"


def _rows(section: keys.Section, prefix: str) -> Iterator[str]:
  for name, node in section.keys.items():
    path = f"`{prefix}{name}`"
    if isinstance(node, keys.Section):
      yield f"| **`{prefix}{name}`** | | *{node.doc}* |"
      yield from _rows(node, f"{prefix}{name}.")
    elif isinstance(node, keys.Items):
      yield f"| **{path}** | {_default(node.default)} | *{node.doc}* |"
      yield from _rows(node.item, f"{prefix}{name}.N.")
    elif isinstance(node, keys.Refused):
      yield f"| {path} | | An error: {node.reason}. |"
    elif isinstance(node, keys.Key):
      yield f"| {path} | {_default(node.default)} | {_meaning(node)} |"


def _default(value: Any) -> str:
  return "required" if value is keys.REQUIRED else f"`{_text(value)}`"


def _text(value: Any) -> str:
  return f'"{value}"'.replace("\n", "\\n") if isinstance(
      value, str) else repr(value)


def _meaning(key: keys.Key) -> str:
  parts = [key.doc]
  kind = keys.TYPE_NAMES[key.type].removeprefix("a ").removeprefix("an ")
  if key.choices:
    parts.append("One of " + ", ".join(
        f"`{_text(choice)}`" for choice in key.choices) + ".")
  elif key.function:
    parts.append("`module:function` or `file.py:function`.")
  else:
    limits = f", in {key.bounds}" if key.bounds else ""
    parts.append(f"({kind}{limits})")
  if key.needs:
    parts.append(f"Only if `{key.needs}`.")
  return " ".join(parts).replace("|", "\\|")


def main() -> None:
  page = pathlib.Path(sys.argv[1])
  page.write_text(insert(page.read_text()))


if __name__ == "__main__":
  main()
