"""The worked values, as data."""

import json
import pathlib

VALUES = json.loads(
    (pathlib.Path(__file__).parents[1] / "data/oracles.json").read_text())


def named(prefix):
  """`(name without the prefix, value)` of every entry that begins so."""
  return [(name.removeprefix(prefix), value)
          for name, value in VALUES.items() if name.startswith(prefix)]
