"""Names on the pages exist: files, make targets, flags, keys, links."""

import importlib
import pathlib
import re
import shlex

import pytest

from posttrain import config as config_lib
from posttrain.cli import arguments

ROOT = pathlib.Path(__file__).parents[2]
PAGES = ["README.md", *sorted(
    str(path.relative_to(ROOT)) for path in (ROOT / "docs").glob("*.md"))]
FOLDERS = ("posttrain", "configs", "launch", "docs", "tests", "benchmarks")
README = (ROOT / "README.md").read_text()


def commands(page):
  """Commands in fenced blocks, one string each, without their comments."""
  blocks = re.findall(r"```(?:sh)?\n(.*?)```", (ROOT / page).read_text(), re.S)
  lines = "".join(blocks).replace("\\\n", " ").splitlines()
  return [line.partition(" #")[0].removeprefix("$ ") for line in lines]


@pytest.mark.parametrize("page", PAGES)
def test_files_and_links_exist(page):
  text = (ROOT / page).read_text()
  named = re.findall(rf"\b((?:{'|'.join(FOLDERS)})/[\w./-]*\w)", text)
  missing = [name for name in named if not (ROOT / name).exists()
             and not name.startswith("posttrain/_")]
  links = [link for link in re.findall(r"\]\(([^)#]+)", text)
           if "://" not in link]
  missing += [link for link in links
              if not (ROOT / page).parent.joinpath(link).exists()]
  assert not missing


def test_make_targets_exist():
  makefile = (ROOT / "Makefile").read_text()
  targets = set(re.findall(r"^([\w-]+):", makefile, re.M))
  named = {name for page in PAGES for name in re.findall(
      r"(?:^|`)make ([\w-]+)", (ROOT / page).read_text(), re.M)}
  assert {"quickstart", "test", "smollm2", "benchmark"} <= named <= targets


@pytest.mark.parametrize("page", PAGES)
def test_commands_are_accepted(page):
  """Flags and config keys, as the program reads them before JAX starts."""
  for command in commands(page):
    if not command.startswith("posttrain ") or page == "docs/configs.md":
      continue  # That page shows a command that fails.
    verb, given = arguments.parse(shlex.split(command)[1:])
    assert verb in arguments.make_parsers()
    if getattr(given, "config", None) and given.config.startswith("configs/"):
      name, _, argument = given.config.partition(":")
      config_lib.load(f"{ROOT / name}:{argument}", given.assignments)


@pytest.mark.parametrize("page", PAGES)
def test_launchers_take_their_commands(page, monkeypatch, capsys):
  """A dry run also checks the command that is launched."""
  monkeypatch.chdir(ROOT)
  for command in commands(page):
    if command.startswith("python -m launch."):
      _, _, module, *words = shlex.split(command)
      dry = [] if "--dry-run" in words else ["--dry-run"]
      assert importlib.import_module(module).run([*dry, *words]) == 0


def test_the_config_of_the_readme(tmp_path):
  [text] = re.findall(r"```python\n(.*?)```", README, re.S)
  file = tmp_path / "my_config.py"
  file.write_text(text)
  body = text.splitlines()[text.splitlines().index("def get_config():"):]
  assert len(body) <= 20
  config = config_lib.load(
      str(file), ["reason.learning_rate=3e-6"])
  assert [config[name].kind for name in config.stages] == [
      "sft", "rl", "evaluate"]


def test_the_tree_of_the_readme_is_whole():
  [tree] = re.findall(r"```\nconfigs/.*?```", README, re.S)
  named = set(re.findall(r"^  ([\w.]+)/? ", tree, re.M))
  found = {path.name for path in (ROOT / "posttrain").iterdir()
           if not path.name.startswith(("_", "py.typed"))}
  assert found == named


def test_exit_statuses_agree():
  [table] = re.findall(r"^\| exit status .*?\n\n", README, re.M | re.S)
  statuses = re.findall(r"^\| (\d+) \|", table, re.M)
  assert re.findall(r"\b(\d+) ", arguments.EXIT_STATUS) == statuses
