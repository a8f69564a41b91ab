"""The console off a terminal, on one, and silent."""

import io

import pytest

from posttrain.telemetry import console as console_lib


def plain(**kwargs):
  stream = io.StringIO()
  return console_lib.Console(stream=stream, **kwargs), stream


def on_a_terminal(monkeypatch, width=100):
  monkeypatch.setenv("FORCE_COLOR", "1")
  monkeypatch.setenv("TERM", "xterm-256color")
  monkeypatch.setenv("COLUMNS", str(width))
  monkeypatch.delenv("NO_COLOR", raising=False)
  return plain()


class Clock:
  """Every reading is one `tick` after the last."""

  def __init__(self, ticks):
    self._ticks = iter(ticks)

  def __call__(self):
    return next(self._ticks)


def test_rate_leaves_out_the_first_step_and_gives_the_time_left():
  # Step 1 takes a minute (it compiles), the next three take 2 s each.
  console, stream = plain(clock=Clock([60, 62, 64, 66]), plain_every=0)
  with console.progress("reason", 10) as progress:
    progress.update(1)
    assert progress.seconds_left() is None
    for step in (2, 3, 4):
      progress.update(step, reward=0.51234)
    assert progress.seconds_per_step() == 2
    assert progress.seconds_left() == 12
  last = stream.getvalue().splitlines()[-1]
  assert last == "reason 4/10  2 s/step  eta 0:00:12  reward 0.5123"


def test_plain_progress_lines_are_seconds_apart_and_the_last_is_kept():
  console, stream = plain(clock=Clock(range(1, 21)), plain_every=10)
  with console.progress("sft", 20) as progress:
    for step in range(1, 21):
      progress.update(step)
  steps = [line.split()[1] for line in stream.getvalue().splitlines()]
  assert steps == ["1/20", "11/20", "20/20"]


def test_plain_output_has_no_control_codes():
  console, stream = plain()
  console.heading("reason")
  console.table("step 3", {"loss": 0.25, "time/learn": 2.0})
  console.sample("a sample", [("1 + 1", "sampled"), ("</think>", "forced")])
  assert "\x1b" not in stream.getvalue()
  assert "step 3: loss 0.25, time/learn 2" in stream.getvalue()


def test_plain_sample_marks_forced_and_wait_in_words():
  console, stream = plain()
  console.sample(
      "step 3", [("a", "sampled"), ("Wait", "wait"), ("b", "sampled"),
                 ("</think>", "forced")],
      prompt="Q: ", facts={"reward": 1.0})
  assert "Q: a[wait: Wait]b[forced: </think>]" in stream.getvalue()
  assert "reward 1" in stream.getvalue()


def test_terminal_sample_marks_by_colour(monkeypatch):
  console, stream = on_a_terminal(monkeypatch)
  console.sample("step 3", [("chosen", "sampled"), ("given", "forced")])
  text = stream.getvalue()
  assert "\x1b[1;4;35mgiven" in text  # Bold, underlined, magenta.
  assert "[forced:" not in text


def test_without_colour_the_marks_are_words(monkeypatch):
  console, stream = on_a_terminal(monkeypatch)
  monkeypatch.setenv("NO_COLOR", "1")
  console, stream = plain()
  console.sample("step 3", [("given", "forced")])
  assert "[forced: given]" in stream.getvalue()


def test_a_model_cannot_drive_the_terminal(monkeypatch):
  console, stream = on_a_terminal(monkeypatch)
  console.sample("s", [("\x1b[2J[red]x[/red]\r\n", "sampled")])
  assert "\x1b[2J" not in stream.getvalue()
  assert "\\x1b[2J[red]x[/red]\\x0d" in stream.getvalue()


def test_every_metric_is_in_the_terminal_table(monkeypatch):
  console, stream = on_a_terminal(monkeypatch)
  metrics = {f"group{i % 3}/metric_{i}": i + 0.5 for i in range(17)}
  with console.progress("reason", 10) as progress:
    progress.update(1)
    console.table("step 1", metrics)
  for name, value in metrics.items():
    assert name in stream.getvalue()
    assert str(value) in stream.getvalue()


def test_a_quiet_console_prints_nothing(monkeypatch):
  monkeypatch.setenv("FORCE_COLOR", "1")
  console, stream = plain(quiet=True)
  with console.progress("sft", 2) as progress:
    progress.update(1, loss=1.0)
    console.heading("sft")
    console.line("x")
    console.table("t", {"loss": 1.0})
    console.sample("s", [("x", "sampled")])
    progress.update(2)
  assert stream.getvalue() == ""


def test_example_marks_the_tokens_in_the_loss():
  console, stream = plain()
  console.example(
      "first example", [1, 2, 3, 4], [False, False, True, True],
      lambda ids: "".join("?abcd"[i] for i in ids))
  assert "ab[in the loss: cd]" in stream.getvalue()
  assert "tokens 4  in the loss 2" in stream.getvalue()


def test_unknown_provenance_is_an_error():
  console, _ = plain()
  with pytest.raises(ValueError, match="'guessed'"):
    console.sample("s", [("x", "guessed")])


@pytest.mark.parametrize("value, text", [
    (0.123456, "0.1235"), (1e-6, "1e-06"), (3.0, "3"), (1234567, "1,234,567"),
    (float("nan"), "nan"), ("ok", "ok")])
def test_values(value, text):
  assert console_lib.format_value(value) == text
