"""Contradictions in a thinking budget: one rule for flags, configs, requests.

Only the sampler knows how many tokens it takes to close the thinking, so that
rule is its own (`sampler.requests.budget_problem`).
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any


def problems(
    budget: Mapping[str, Any], *, end: Any, step: Any,
    more_wait_texts: Any = (), name: Callable[[str], str] = str,
) -> Iterator[str]:
  """Finds what is wrong with a budget, each as `field: problem`.

  Args:
    budget: fields of a request, those that are not there being unset;
      `wait_order` is "cycle" or "draw".
    end, step, more_wait_texts: of the section `thinking`; true if set.
    name: turns a field, or a path such as "thinking.end", into what the user
      wrote: a key of the config or a flag.
  """
  minimum = budget.get("min_thinking_tokens", 0)
  maximum = budget.get("max_thinking_tokens", -1)
  if 0 <= maximum < minimum:
    yield (f"{name('min_thinking_tokens')}: {minimum} is above "
           f"{name('max_thinking_tokens')}={maximum}.")
  for field, value in (("min_thinking_tokens", minimum),
                       ("max_thinking_tokens", maximum)):
    if value > budget.get("max_tokens", value):
      yield (f"{name(field)}: {value} is more than "
             f"{name('max_tokens')}={budget['max_tokens']}.")
  steps = budget.get("max_thinking_steps", -1)
  waits = budget.get("num_waits", 0)
  used = [field for field, is_set in (
      ("max_thinking_tokens", maximum >= 0), ("num_waits", waits),
      ("min_thinking_tokens", minimum > 0), ("max_thinking_steps", steps >= 0),
      ("suppress", budget.get("suppress"))) if is_set]
  if used and not end:
    yield (f"{name(used[0])}: set, but thinking.end is empty; set "
           f"{name('thinking.end')}=TEXT to the string that ends thinking.")
  elif steps >= 0 and not step:
    yield (f"{name('max_thinking_steps')}: set, but thinking.step is empty; "
           f"set {name('thinking.step')}=TEXT to the string that ends a step, "
           'such as "\\n\\n".')
  if budget.get("wait_order") == "draw":
    drawn = f"{name('wait_order')}: set to 'draw', but "
    if not more_wait_texts:
      yield (f"{drawn}there is one text to draw from; set "
             f"{name('thinking.more_wait_texts')}.")
    if not waits:
      yield (f"{drawn}it has no effect unless there are waits; set "
             f"{name('num_waits')}.")
