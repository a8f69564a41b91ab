"""Console: progress, tables and samples that a person sees during a run.

On a terminal this is a live progress line with tables and coloured samples
above it. Anywhere else (a log file, a pipe) it is plain lines, with the same
content and no control codes. A quiet console, which every process but the
first should have, prints nothing.

Text that a model produced is never interpreted: control characters are shown
as escapes, and Rich's markup is off.
"""

import collections
import math
import re
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TextIO

import rich.box
import rich.console
import rich.panel
import rich.progress
import rich.table
import rich.text

# Each style differs in more than its colour, for those who cannot see it.
STYLES = {
    "sampled": "",
    "forced": "bold magenta underline",
    "wait": "black on yellow",
    "observation": "black on cyan",
    "context": "dim",
    "thinking": "dim",
    "in the loss": "green",
}
RATE_WINDOW = 32  # Updates that the rate is averaged over.
# Halves of surrogate pairs, which cannot be encoded, among them.
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")


def printable(text: str) -> str:
  """Escapes control characters of `text`, except newline and tab."""
  return CONTROL.sub(lambda match: f"\\x{ord(match[0]):02x}", text)


def format_value(value: float | int | str) -> str:
  """Formats four significant digits; whole numbers in full."""
  if isinstance(value, str):
    return value
  if isinstance(value, bool) or not math.isfinite(value):
    return str(value)
  if value == int(value) and abs(value) < 1e15:
    return f"{int(value):,}"
  return f"{value:.4g}"


def format_seconds(seconds: float) -> str:
  """Formats seconds as hours: `3725.2` -> `1:02:05`."""
  minutes, seconds = divmod(round(seconds), 60)
  hours, minutes = divmod(minutes, 60)
  return f"{hours}:{minutes:02d}:{seconds:02d}"


class Progress:
  """Progress line: steps, rate, time left and a few headline metrics.

  The rate is the mean of the last `RATE_WINDOW` updates. It counts from the end
  of the first step seen, so that this step's compilation is not in it.
  """

  def __init__(
      self, console: rich.console.Console, title: str, num_steps: int, *,
      start: int, clock: Callable[[], float], plain_every: float,
  ):
    self._console = console
    self._title = title
    self._num_steps = num_steps
    self._clock = clock
    self._plain_every = plain_every
    # The first entry is the end of the first step, which has compiled.
    self._times: collections.deque[tuple[float, int]] = collections.deque(
        maxlen=RATE_WINDOW)
    self._last_plain = -math.inf
    self._bar = None
    if console.is_terminal and not console.quiet:
      self._bar = rich.progress.Progress(
          rich.progress.TextColumn("{task.description}", markup=False),
          rich.progress.BarColumn(bar_width=24),
          rich.progress.MofNCompleteColumn(),
          rich.progress.TextColumn("{task.fields[facts]}", markup=False),
          console=console, auto_refresh=False)
      self._task = self._bar.add_task(
          title, total=num_steps, completed=start, facts="compiling")

  def __enter__(self) -> "Progress":
    if self._bar is not None:
      self._bar.start()
    return self

  def __exit__(self, *unused) -> None:
    if self._bar is not None:
      self._bar.stop()

  def seconds_per_step(self) -> float | None:
    """Returns the seconds per step; None until two different steps were seen.
    """
    if len(self._times) < 2 or self._times[-1][1] == self._times[0][1]:
      return None
    (t0, step0), (t1, step1) = self._times[0], self._times[-1]
    return (t1 - t0) / (step1 - step0)

  def seconds_left(self) -> float | None:
    rate = self.seconds_per_step()
    if rate is None:
      return None
    return rate * (self._num_steps - self._times[-1][1])

  def update(self, step: int, **headline: float) -> None:
    """Records that `step` steps are done, and redraws the line.

    Args:
      step: number of finished steps, in 0..num_steps.
      **headline: the few metrics worth a place on the line.
    """
    now = self._clock()
    self._times.append((now, step))
    facts = self._facts(headline)
    if self._bar is not None:
      self._bar.update(self._task, completed=step, facts=facts, refresh=True)
    elif step == self._num_steps or now - self._last_plain >= self._plain_every:
      self._last_plain = now
      self._console.print(
          f"{self._title} {step}/{self._num_steps}  {facts}", soft_wrap=True)

  def _facts(self, headline: Mapping[str, float]) -> str:
    rate, left = self.seconds_per_step(), self.seconds_left()
    facts = []
    if rate is not None and left is not None:
      facts.append(
          f"{rate:.3g} s/step" if rate >= 1 else f"{1 / rate:.3g} steps/s"
          if rate > 0 else "")
      facts.append(f"eta {format_seconds(left)}")
    facts += [f"{name} {format_value(x)}" for name, x in headline.items()]
    return "  ".join(fact for fact in facts if fact)


class Console:
  """Prints to one stream, see the module's text.

  Args:
    quiet: print nothing at all (`jax.process_index() != 0`).
    stream: standard output by default.
    clock: seconds, monotonic.
    plain_every: seconds between progress lines where there is no terminal.
  """

  def __init__(
      self, *, quiet: bool = False, stream: TextIO | None = None,
      clock: Callable[[], float] = time.monotonic, plain_every: float = 10.0,
  ):
    stream = sys.stdout if stream is None else stream
    self._console = rich.console.Console(
        file=stream, quiet=quiet, markup=False, emoji=False, highlight=False)
    self._clock = clock
    self._plain_every = plain_every

  @property
  def coloured(self) -> bool:
    """Tests if colour can be relied on to carry meaning."""
    return self._console.is_terminal and not self._console.no_color

  def line(self, text: str, style: str = "") -> None:
    """Prints one line; `style` is Rich's and has no effect off a terminal."""
    self._console.print(
        rich.text.Text(printable(text), style=style), soft_wrap=True)

  def warning(self, text: str) -> None:
    self.line(f"warning: {text}", style="bold yellow")

  def heading(self, text: str) -> None:
    """Prints the heading of a stage."""
    if self._console.is_terminal:
      self._console.rule(rich.text.Text(printable(text), style="bold"))
    else:
      self.line(f"== {text} ==")

  def progress(
      self, title: str, num_steps: int, *, start: int = 0) -> Progress:
    """Makes a progress line; text printed inside the context goes above it."""
    return Progress(
        self._console, title, num_steps, start=start, clock=self._clock,
        plain_every=self._plain_every)

  def table(self, title: str, metrics: Mapping[str, float | int | str]) -> None:
    """Prints a table of metrics, grouped by the part of the name before "/"."""
    cells = [(name, format_value(metrics[name]))
             for name in sorted(metrics, key=lambda name: ("/" in name, name))]
    if not self._console.is_terminal:
      self.line(f"{title}: " + ", ".join(f"{n} {v}" for n, v in cells))
      return
    # Up to four pairs side by side, filled column by column, so that metrics
    # of one group stay below each other.
    width = 4 + max((len(n) + len(v) for n, v in cells), default=0)
    columns = max(1, min(4, (self._console.width - 2) // (width + 2)))
    rows = math.ceil(len(cells) / columns)
    table = rich.table.Table(
        title=rich.text.Text(title), title_justify="left", box=rich.box.SIMPLE,
        show_header=False, pad_edge=False)
    for _ in range(columns):
      table.add_column(style="cyan", no_wrap=True)
      table.add_column(justify="right", no_wrap=True)
    for row in range(rows):
      picked = cells[row::rows]
      table.add_row(*(text for cell in picked for text in cell))
    self._console.print(table)

  def sample(
      self, title: str, segments: Sequence[tuple[str, str]], *,
      prompt: str = "", facts: Mapping[str, float | int | str] | None = None,
  ) -> None:
    """Prints one completion, with the text that the policy did not choose
    marked.

    Args:
      title: names the prompt or problem.
      segments: (text, provenance) in order; provenance is "sampled",
        "forced", "wait" or "observation".
      prompt: shown dimmed in front.
      facts: reward, finish reason and the like, below.
    """
    legend = [name for name in ("forced", "wait", "observation")
              if any(provenance == name for _, provenance in segments)]
    if prompt:
      segments = [(prompt, "context"), *segments]
    self._marked(title, segments, legend, facts or {})

  def example(
      self, title: str, tokens: Sequence[int], loss_mask: Sequence[bool],
      decode: Callable[[list[int]], str],
  ) -> None:
    """Prints one rendered training example, with the tokens in the loss marked.

    Args:
      tokens, loss_mask: [T].
      decode: token ids to text, special tokens included.
    """
    # Whole runs are decoded: a character may be spread over several tokens.
    runs: list[tuple[list[int], bool]] = []
    for token, in_loss in zip(tokens, loss_mask, strict=True):
      if not runs or runs[-1][1] != bool(in_loss):
        runs.append(([], bool(in_loss)))
      runs[-1][0].append(int(token))
    segments = [(decode(ids), "in the loss" if in_loss else "context")
                for ids, in_loss in runs]
    facts = {"tokens": len(tokens), "in the loss": sum(map(bool, loss_mask))}
    self._marked(title, segments, ["in the loss"], facts)

  def _marked(self, title, segments, legend, facts) -> None:
    body = rich.text.Text()
    for text, provenance in segments:
      if provenance not in STYLES:
        raise ValueError(
            f"segment provenance is {provenance!r}, and must be one of "
            f"{', '.join(STYLES)}.")
      text = printable(text)
      if provenance in legend and not self.coloured:
        text = f"[{provenance}: {text}]"
      body.append(text, style=STYLES[provenance])
    below = "  ".join(f"{name} {format_value(x)}" for name, x in facts.items())
    if not self._console.is_terminal:
      self.line(f"-- {title}")
      self._console.print(body, soft_wrap=True)
      self.line(f"-- {below}")
      return
    subtitle = rich.text.Text(below)
    for name in legend:
      subtitle.append("  ")
      subtitle.append(f" {name} ", style=STYLES[name])
    self._console.print(rich.panel.Panel(
        body, title=rich.text.Text(title), subtitle=subtitle,
        title_align="left", subtitle_align="left", border_style="dim"))
