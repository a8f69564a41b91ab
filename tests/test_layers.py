"""Layers of imports: read from the sources, nothing is imported here.

The table below is the one of docs/design.md. A module that is new at the top
of `posttrain/` has to be given a place in it.
"""

import ast
import graphlib
import pathlib
import re

import pytest

from posttrain.config import stages
from posttrain.sharding import MESH_AXES

ROOT = pathlib.Path(__file__).parents[1]

# A unit is a package or a top-level module. It imports itself and units of
# lower layers; units of one layer do not know each other.
LAYERS = (
    ("sharding", "text", "tasks", "objectives", "evaluation", "rendezvous",
     "host_connections", "lease", "mistakes", "model.config"),
    ("model.presets", "distributed", "leftovers", "provenance"),
    ("config", "model", "data"),
    ("workdir", "sampler", "interop"),
    ("telemetry",),
    ("train", "episodes"),
    ("rl", "weights"),
    ("programs",),
    ("stages",),
    ("pipeline", "convert", "plan", "report"),
    ("cli",),
    ("__main__",),
)
LEVEL = {unit: i for i, units in enumerate(LAYERS) for unit in units}

# Where a whole config may be held; below, functions take their own arguments.
SEE_CONFIGS = {
    "config", "workdir", "weights", "stages", "pipeline", "convert", "plan",
    "cli"}


def module_name(path: pathlib.Path) -> str:
  parts = path.relative_to(ROOT).with_suffix("").parts
  return ".".join(part for part in parts if part != "__init__")


FILES = {module_name(path): path
         for path in sorted((ROOT / "posttrain").rglob("*.py"))}
TREES = {name: ast.parse(path.read_text()) for name, path in FILES.items()}


def unit_of(module: str) -> str:
  below = module.removeprefix("posttrain.")
  return below if below in LEVEL else below.partition(".")[0]


def imports_of(module: str) -> set[str]:
  """Every module that is imported anywhere in it, inside functions too."""
  found = set()
  for node in ast.walk(TREES[module]):
    if isinstance(node, ast.Import):
      found |= {alias.name for alias in node.names}
    elif isinstance(node, ast.ImportFrom):
      assert node.level == 0, f"{module}: imports are absolute"
      for alias in node.names:
        full = f"{node.module}.{alias.name}"
        found.add(full if full in FILES else str(node.module))
  return found


GRAPH = {name: imports_of(name) for name in FILES}
INSIDE = {name: {other for other in found if other in FILES}
          for name, found in GRAPH.items()}


def reached_from(unit: str) -> set[str]:
  """All that importing a unit imports, of posttrain and of others."""
  todo = [name for name in FILES if unit_of(name) == unit]
  found = set(todo)
  while todo:
    new = GRAPH.get(todo.pop(), set()) - found
    found |= new
    todo += new
  return found


def uses_jax(modules: set[str]) -> list[str]:
  return [name for name in modules if name.partition(".")[0] == "jax"]


def test_the_page_has_this_table():
  page = (ROOT / "docs/design.md").read_text()
  rows = re.findall(r"^\| (\d+) \| (.*?) \|", page, re.M)
  units = [tuple(re.findall(r"`(.*?)`", row)) for _, row in reversed(rows)]
  assert [int(number) for number, _ in rows] == list(range(len(rows), 0, -1))
  assert (*units, ("__main__",)) == LAYERS


def test_there_are_no_cycles():
  order = graphlib.TopologicalSorter(INSIDE).static_order()  # Or CycleError.
  assert set(INSIDE) <= set(order)


def test_every_module_has_a_layer():
  units = {unit_of(name) for name in FILES if name != "posttrain"}
  assert units == set(LEVEL)


def test_imports_go_down():
  wrong = [
      f"{name} imports {other}" for name, found in INSIDE.items()
      for other in found - {"posttrain"}
      if unit_of(name) != unit_of(other)
      and LEVEL[unit_of(name)] <= LEVEL[unit_of(other)]]
  assert not wrong, wrong


def test_stages_do_not_import_each_other():
  kinds = {f"posttrain.stages.{kind}" for kind in stages.KINDS}
  assert kinds <= set(FILES)
  wrong = [f"{name} imports {other}" for name, found in INSIDE.items()
           for other in found & kinds
           if name.startswith("posttrain.stages.")]
  assert not wrong, wrong


@pytest.mark.parametrize("unit", [
    "config", "workdir", "text", "tasks", "data", "evaluation"])
def test_units_that_never_import_jax(unit):
  """Directly or through another module of posttrain."""
  assert not uses_jax(reached_from(unit))


@pytest.mark.parametrize("unit", ["text", "tasks", "objectives", "evaluation"])
def test_units_that_know_nothing_of_the_rest(unit):
  others = {name for name in reached_from(unit)
            if name in FILES and unit_of(name) != unit}
  assert not others


def test_whole_configs_stay_above_the_stages():
  holders = {unit_of(name) for name, found in GRAPH.items()
             if any(f.partition(".")[0] == "ml_collections" for f in found)}
  assert holders <= SEE_CONFIGS


def test_only_sharding_names_a_mesh_axis():
  """JAX is given axes as strings; keyword names are config keys.

  Two of the axes have names that mean other things elsewhere.
  """
  axes = set(MESH_AXES) - {"data", "context"}
  wrong = [
      f"{name}:{node.lineno}" for name, tree in TREES.items()
      for node in ast.walk(tree)
      if isinstance(node, ast.Constant) and node.value in axes
      and name != "posttrain.sharding"]
  assert not wrong, wrong


def test_only_sharding_writes_a_partition():
  """Others say `spec("batch", ...)`, or reuse the spec that an array has."""
  holders = {
      name for name, tree in TREES.items() for node in ast.walk(tree)
      if "PartitionSpec" in (
          getattr(node, "attr", ""), getattr(node, "id", ""),
          getattr(node, "name", ""))}
  assert holders == {"posttrain.sharding"}
