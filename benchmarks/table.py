"""Markdown table of ratios, from the lines of a run."""

from benchmarks import systems

HEADER = ("work", "shape", "system", "tokens/s", "per CPU s", "peak MB",
          "of the limit", "ours / it", "per CPU s", "target", "memory")


def of(lines: list[dict]) -> str:
  """Formats `lines` of any works; those of a work must include ours."""
  ours = {(line["size"], line["work"]): line for line in lines
          if line["system"] == systems.OURS}
  rows = [_row(line, ours[line["size"], line["work"]]) for line in lines]
  return "\n".join(
      "| " + " | ".join(row) + " |"
      for row in [HEADER, ("---",) * len(HEADER), *rows])


def _row(line: dict, ours: dict) -> tuple[str, ...]:
  key = line["size"], line["work"], line["system"]
  ratio = lambda name: ours[name] / line[name]
  compared = ("", "", "", "")
  if line is not ours:
    target, memory = systems.TARGETS.get(key), systems.MEMORY.get(key)
    compared = (
        f"{ratio('tokens_per_s'):.2f}", f"{ratio('tokens_per_cpu_s'):.2f}",
        _judged(ratio("tokens_per_s"), target, target is not None
                and ratio("tokens_per_s") >= target),
        _judged(ratio("peak_rss_mb"), memory, memory is not None
                and ratio("peak_rss_mb") <= memory))
  return (
      f"{line['work']} {line['size']}", line["shape"], line["system"],
      f"{line['tokens_per_s']:,.0f}", f"{line['tokens_per_cpu_s']:,.0f}",
      f"{line['peak_rss_mb']:,.0f}", f"{line['share_of_limit']:.0%}",
      *compared)


def _judged(found: float, bound: float | None, met: bool) -> str:
  if bound is None:
    return f"{found:.2f}"
  return f"{found:.2f} / {bound} {'met' if met else 'missed'}"
