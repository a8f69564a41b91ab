"""A trace holds the steps of its range and no other."""

import jax
import jax.numpy as jnp
import pytest

from posttrain.telemetry.stage_telemetry import Tracer


def program(name):
  def function(x):
    return x * 2 + 1
  function.__name__ = name
  return jax.jit(function)


@pytest.fixture(scope="module")
def programs():
  """One of its own for every step, compiled."""
  made = {step: program(f"marked_{step}") for step in range(1, 6)}
  for function in made.values():
    function(jnp.ones(3))
  return made


def run(tracer, programs, steps):
  x = jnp.ones(3)
  for step in steps:
    tracer.before(step, x)
    x = programs[step](x)
    tracer.after(step, x)
  tracer.close()


def traced(directory):
  """The steps whose programs are in a trace that was written."""
  events = " ".join(
      event.name for file in directory.rglob("*.xplane.pb")
      for plane in jax.profiler.ProfileData.from_file(str(file)).planes
      for line in plane.lines for event in line.events)
  return [step for step in range(1, 6) if f"marked_{step}" in events]


@pytest.mark.parametrize("steps, run_from, found", [
    ((2, 3), 1, [2, 3]), ((4,), 1, [4]), ((4, 5), 4, [4, 5]),
    ((2, 4), 3, []),  # A resume past the first step.
    ((), 1, []),
])
def test_the_steps_of_the_range_are_traced(
    tmp_path, programs, steps, run_from, found):
  lines = []
  run(Tracer(tmp_path, steps, say=lines.append), programs,
      range(run_from, 6))
  assert traced(tmp_path) == found
  assert [str(tmp_path) in line for line in lines] == [True] * bool(found)


def test_a_run_that_ends_within_the_range_leaves_what_it_has(
    tmp_path, programs):
  run(Tracer(tmp_path, (2, 5), say=print), programs, range(1, 4))
  assert traced(tmp_path) == [2, 3]


def test_other_hosts_trace_nothing(tmp_path, programs):
  run(Tracer(tmp_path, (2, 3), say=print, write=False), programs,
      range(1, 6))
  assert traced(tmp_path) == []
