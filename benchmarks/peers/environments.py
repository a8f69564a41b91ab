"""Environments of the peers, with the versions that a `.txt` pins.

  python -m benchmarks.peers.environments  # All of them.
"""

import argparse
import pathlib
import subprocess
import sys
import venv

DIRECTORY = ".venv-peers"
REQUIREMENTS = {
    path.stem: path
    for path in sorted(pathlib.Path(__file__).parent.glob("*.txt"))}


def python(name: str, directory: str = DIRECTORY) -> str:
  """Returns the interpreter of an environment; makes it if needed."""
  place, wanted = pathlib.Path(directory) / name, REQUIREMENTS[name]
  program = place / ("Scripts" if sys.platform == "win32" else "bin") / "python"
  stamp = place / "installed.txt"
  if not stamp.exists() or stamp.read_text() != wanted.read_text():
    print(f"Installing {wanted} into {place}.", file=sys.stderr)
    venv.create(place, clear=True, with_pip=True)
    subprocess.run(
        [program, "-m", "pip", "install", "--quiet", "-r", wanted], check=True)
    stamp.write_text(wanted.read_text())
  return str(program)


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--environments", default=DIRECTORY)
  for name in REQUIREMENTS:
    print(python(name, parser.parse_args().environments))


if __name__ == "__main__":
  main()
