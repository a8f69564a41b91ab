"""`python -m benchmarks`: tokens per second, with peers' and the limit.

  python -m benchmarks --size=10m --json=speed.jsonl
  python -m benchmarks --size=10m --peers --work=sft  # Makes environments.

A line of JSON for each system and work, and one table of ratios. Medians of
`--repeats` runs after a warm-up; systems take turns; process CPU seconds are
those of all threads. `share_of_limit` is the least time of the work's matrix
products and bytes over the wall-clock time. The rates of these products and the
memory bandwidth are measured in the same rounds.
"""

import argparse
import datetime
import json
import os
import pathlib
import platform
from importlib import metadata

from benchmarks import shapes, systems, table, turns
from benchmarks.peers import environments


def parse(argv: list[str] | None = None) -> argparse.Namespace:
  parser = argparse.ArgumentParser(
      prog="python -m benchmarks", description=__doc__,
      formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--size", choices=sorted(shapes.SIZES), default="10m")
  parser.add_argument("--json", help="file for the lines")
  parser.add_argument("--work", choices=shapes.WORKS, action="append",
                      help="only this one; may be repeated")
  parser.add_argument("--peers", nargs="*", choices=sorted(systems.PEERS),
                      help="these too, or all, where there is a target")
  parser.add_argument("--rows", type=int, default=8, help="of an SFT step")
  parser.add_argument("--repeats", type=int, default=5)
  parser.add_argument("--environments", default=environments.DIRECTORY,
                      help="folder of the peers' environments")
  parser.add_argument("--lock", action="append", default=[],
                      help="file to lock meanwhile; may be repeated")
  return parser.parse_args(argv)


def machine() -> str:
  """Describes the machine and the time in one line."""
  cpu = platform.processor() or platform.machine()
  info = pathlib.Path("/proc/cpuinfo")
  if info.exists():
    names = [line.split(":", 1)[1].strip()
             for line in info.read_text().splitlines()
             if line.startswith("model name")]
    cpu = names[0] if names else cpu
  versions = ", ".join(
      f"{name} {metadata.version(name)}" for name in ("jax", "flax", "optax"))
  load = ", ".join(f"{x:.1f}" for x in os.getloadavg())
  return (f"{datetime.datetime.now():%Y-%m-%d %H:%M}, {cpu}, {os.cpu_count()} "
          f"cores, load {load}, Python {platform.python_version()}, {versions}")


def _peers(arguments: argparse.Namespace, work: str) -> list[str]:
  if arguments.peers is None:
    return []
  wanted = arguments.peers or systems.PEERS
  return [name for name in systems.peers_of(arguments.size, work)
          if name in wanted]


def measure(
    arguments: argparse.Namespace, work: str,
) -> tuple[list[dict], dict]:
  """Measures one work; returns its lines, ours first, and the machine's rates.
  """
  size, shape = arguments.size, shapes.shape_of(work, rows=arguments.rows)
  command = lambda python, module: turns.command_of(
      python, module, size, work, shape)
  commands = {systems.OURS: command(turns.OURS, "benchmarks.ours")}
  for name in _peers(arguments, work):
    peer = systems.PEERS[name]
    commands[name] = command(environments.python(
        peer.environment, arguments.environments), peer.module)
  taken, rates = turns.take(
      commands, command(turns.OURS, "benchmarks.machine"),
      repeats=arguments.repeats, locks=arguments.lock)
  return [{
      "system": name, "work": work, "size": size,
      "tokens_per_cpu_s": shape.tokens / found.median("cpu"),
      "tokens_per_s": shape.tokens / found.median("wall"),
      "share_of_limit": rates["seconds"] / found.median("wall"),
      "peak_rss_mb": found.peak_rss_mb, "shape": str(shape)}
      for name, found in taken.items()], rates


def main(argv: list[str] | None = None) -> None:
  arguments = parse(argv)
  print(machine())
  lines = []
  for work in arguments.work or shapes.WORKS:
    found, rates = measure(arguments, work)
    print(f"{work}: the machine did {rates['flops_per_sec'] / 1e9:.0f} GFLOP/s "
          f"of its products and {rates['bytes_per_sec'] / 1e9:.1f} GB/s; "
          f"limit {rates['seconds']:.3f} s.", flush=True)
    lines += found
    if arguments.json:  # After each work: a run takes long.
      pathlib.Path(arguments.json).write_text(
          "".join(json.dumps(line) + "\n" for line in lines))
  print(table.of(lines))


if __name__ == "__main__":
  main()
