"""Limits the work of a chat template in one rendering.

Each operation that makes a text or a list announces the size of its result
before it is made: operators, methods, filters, literals and the output itself.
All sizes together and the iterations of all loops may not exceed `MOST_WORK` in
one rendering. This is a count rather than a time, so that it is the same on
every host and under any load. The rest (comparisons, searches) is limited by
`SECONDS` of the thread's own processor time, which is read now and then.

`sandbox` says where in a template this is called.
"""

import contextlib
import contextvars
import functools
import json
import re
import string
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NoReturn

import jinja2

# In characters. A conversation of a million tokens needs a fifth of it.
MOST_WORK = 2**27
# Characters that an element of a list and an iteration of a loop count as.
ELEMENT, TURN = 16, 32
SECONDS = 5.0
LOOK_EVERY = 2**12  # Characters between two readings of the clock.
MOST_BITS = 1024  # The largest whole number.
WIDEST = 1000  # The widest field of a format, in characters.

# Methods of texts and numbers, and filters, whose results can have any size or
# take any time, and that no chat template needs.
REFUSED = frozenset((
    "center", "encode", "expandtabs", "ljust", "maketrans", "rjust",
    "to_bytes", "translate", "zfill"))
REFUSED_FILTERS = frozenset((
    "center", "pprint", "random", "striptags", "urlize", "wordwrap",
    "xmlattr"))

_SOME = {"": ""}
CONTAINERS: tuple[type[Iterable[Any]], ...] = (
    list, tuple, dict, type(_SOME.keys()), type(_SOME.values()),
    type(_SOME.items()))
# A field of `%` whose width or precision is wide, or an argument.
_WIDE = re.compile(
    r"%(\([^)]*\))?[-+ #0]*(\d{4}|\*|\d*\.(\d{4}|\*))")


class TemplateLimitError(ValueError):
  """A rendering exceeds its limits: the template is at fault, not a row."""


class _Work:
  """The remaining allowance of a rendering."""

  def __init__(self, name: str):
    self._name = name
    self.left, self.look = MOST_WORK, MOST_WORK - LOOK_EVERY
    self._deadline = time.thread_time() + SECONDS

  def check(self) -> None:
    """Raises TemplateLimitError if the allowance or the time is used up."""
    self.look = self.left - LOOK_EVERY
    if self.left < 0:
      self.fail(f"makes more than {MOST_WORK:,} characters (an element of a "
                f"list counts as {ELEMENT}, a turn of a loop as {TURN})")
    if time.thread_time() > self._deadline:
      self.fail(f"takes more than {SECONDS:g} s")

  def fail(self, what: str) -> NoReturn:
    raise TemplateLimitError(
        f"{self._name} {what} for one conversation. Correct the template, or "
        "choose another (chat_template).")


_WORK: contextvars.ContextVar[_Work] = contextvars.ContextVar("work")


@contextlib.contextmanager
def limited(name: str) -> Iterator[None]:
  """Gives the code within, in this thread, one allowance.

  Args:
    name: names the template in error messages.
  """
  token = _WORK.set(_Work(name))
  try:
    yield
  finally:
    _WORK.reset(token)


def spend(size: int) -> None:
  """Takes from the allowance.

  Raises:
    TemplateLimitError: less than that is left.
  """
  work = _WORK.get()
  work.left -= size
  if work.left < work.look:
    work.check()


def nodes(value: Any, texts: bool = False) -> int:
  """Returns the size of a value with its content; texts as elements or in full.

  An object that is in it twice counts twice, as it does when it becomes text.
  """
  if isinstance(value, str):
    return len(value) if texts else ELEMENT
  # A loop rather than recursion, as a value may be nested deeply; and it stops
  # at the limit, as a value that shares its parts may be exponentially large.
  waiting: list[Any] = [value]
  total = ELEMENT
  while waiting and total <= MOST_WORK:
    item = waiting.pop()
    total += ELEMENT
    if isinstance(item, str):
      total += len(item) if texts else 0
    elif isinstance(item, dict):
      waiting.extend(item)
      waiting.extend(item.values())
    elif isinstance(item, CONTAINERS):
      waiting += item
  return total


def as_text(value: Any) -> int:
  """Returns the size of a value as text."""
  return nodes(value, texts=True)


def spend_on(value: Any) -> None:
  """Takes the size of a value that was just made from the allowance."""
  if isinstance(value, str):
    spend(len(value))
  elif isinstance(value, CONTAINERS):
    spend(nodes(value))


def concat(parts: Iterable[str]) -> str:
  """Joins the output of a template, macro or block."""
  kept = []
  for part in parts:
    spend(len(part))
    kept.append(part)
  return "".join(kept)


def before_operation(operator: str, left: Any, right: Any) -> None:
  """Takes the size of the result of +, *, ** or % from the allowance."""
  if operator == "%":
    spend(_percent(left, right) if isinstance(left, str) else 1)
  elif operator == "*":
    spend(_times(left, right) + _times(right, left))
  elif operator == "+":
    for value in (left, right):
      spend_on(value)
  elif isinstance(left, int) and isinstance(right, int) and (
      abs(left) > 1 and right > MOST_BITS):
    _WORK.get().fail(f"computes a number of more than {MOST_BITS} bits")


def check_number(value: Any) -> None:
  """Raises TemplateLimitError if a whole number has too many bits."""
  if isinstance(value, int) and value.bit_length() > MOST_BITS:
    _WORK.get().fail(f"computes a number of more than {MOST_BITS} bits")


def _times(value: Any, times: Any) -> int:
  if not isinstance(value, (str, list, tuple)) or not isinstance(times, int):
    return 1
  one = len(value) if isinstance(value, str) else nodes(value)
  return max(times, 0) * one


def _percent(form: str, values: Any) -> int:
  """Returns the largest size of `form % values`."""
  if _WIDE.search(form):
    _too_wide(form)
  return _repeated(form, form.count("%"), values)


def before_format(form: str, values: Any) -> None:
  """Takes the largest size of `form.format(*values)` from the allowance."""
  fields = 0
  for _, field, spec, _ in string.Formatter().parse(form):
    fields += field is not None
    if spec and re.search(r"\d{4}|\{", spec):
      _too_wide(form)
  spend(_repeated(form, fields, values))


def _too_wide(form: str) -> NoReturn:
  _WORK.get().fail(f"has the format {form[:40]!r}, with a field of {WIDEST} "
                   "or more characters, or of any width,")


def _repeated(form: str, fields: int, values: Any) -> int:
  """Returns the size of a format's result if each field took all values."""
  return len(form) + fields * (as_text(values) + WIDEST)


def before_method(owner: str | int, name: str, args: Any) -> Any:
  """Takes the size of a method's result, of a text or number, from the
  allowance.

  Returns:
    The arguments; a generator among them is a list, as its size was needed.

  Raises:
    SecurityError: there is no such method in a chat template.
  """
  if name in REFUSED:
    raise jinja2.exceptions.SecurityError(
        f"`{name}` may make texts of any size, and is not allowed.")
  if not isinstance(owner, str) or name in ("startswith", "endswith"):
    spend(TURN)
  elif name == "join" and len(args) == 1:
    args = [args[0] if isinstance(args[0], str) else list(args[0])]
    spend(as_text(args[0]) + len(owner) * len(args[0]))
  elif name == "replace":
    spend(_replaced(owner, *args))
  elif name in ("split", "rsplit", "splitlines"):
    spend(_split(owner, *args[:name != "splitlines"]))
  else:
    spend(len(owner))
  return args


# Sizes of the results of filters, where they may exceed those of the arguments.

def _replaced(text: Any, old: Any = "", new: Any = "", *_: Any) -> int:
  times = text.count(old) if isinstance(text, str) and isinstance(
      old, str) else as_text(text)
  return as_text(text) + times * as_text(new)


def _split(text: Any, separator: Any = None, *_: Any, **__: Any) -> int:
  """Returns the size of a split; by words, every other character ends one."""
  if isinstance(separator, str) and separator:
    return len(text) + ELEMENT * text.count(separator)
  return as_text(text) * ELEMENT // 2


def _listed(value: Any, *_: Any, **__: Any) -> int:
  return ELEMENT * len(value) if hasattr(value, "__len__") else TURN


def _indent(text: Any, width: Any = 4, *_: Any, **__: Any) -> int:
  one = len(width) if isinstance(width, str) else width
  return as_text(text) + len(str(text).splitlines()) * one


def _lines(value: Any, *args: Any, **kwargs: Any) -> int:
  """Returns the size of `batch` and `slice`: lines, or their elements."""
  given = [*args, *kwargs.values()]
  numbers = [each for each in given if isinstance(each, int)]
  return max(numbers, default=0) * nodes(given)


def _sum(value: Any, attribute: Any = None, start: Any = 0) -> int:
  if not isinstance(start, (int, float)):
    raise TypeError("`sum` adds numbers only")  # A sum of lists is quadratic.
  return TURN


def _round(value: Any, precision: Any = 0, *_: Any, **__: Any) -> int:
  return TURN if abs(precision) < MOST_BITS else MOST_WORK + 1


_SIZES: Mapping[str, Callable[..., int]] = {
    "replace": _replaced, "indent": _indent, "batch": _lines,
    "slice": _lines, "sum": _sum, "round": _round,
    "format": lambda form, *args, **kwargs: _percent(
        str(form), [*args, *kwargs.values()]),
    "title": lambda value: _split(value),
    "wordcount": lambda value: _split(value),
    **dict.fromkeys(
        ("dictsort", "groupby", "list", "reverse", "sort", "unique"), _listed),
    **dict.fromkeys(
        ("capitalize", "e", "escape", "forceescape", "lower", "safe",
         "string", "trim", "truncate", "upper", "urlencode"),
        lambda value, *_, **__: as_text(value))}
# Filters that return a part of their argument, which was counted.
_PICKS = frozenset(("attr", "d", "default", "first", "last", "max", "min"))


def bounded(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
  """Wraps a filter so that it counts the size of its result."""
  # The first argument is the context or environment, if the filter wants it.
  first = int(hasattr(function, "jinja_pass_arg"))
  size = _SIZES.get(name, lambda *_, **__: TURN)

  @functools.wraps(function)
  def call(*args: Any, **kwargs: Any) -> Any:
    if name == "join":
      args = *args[:first], list(args[first]), *args[first + 1:]
      between = [*args[first + 1:], *kwargs.values()]
      spend(as_text(args[first]) + as_text(between) * len(args[first]))
    spend(size(*args[first:], **kwargs))
    result = function(*args, **kwargs)
    if name not in _PICKS:
      spend_on(result)
    return result

  return call


def tojson(
    value: Any, ensure_ascii: bool = False, indent: int | None = None,
    separators: tuple[str, str] | None = None, sort_keys: bool = False,
) -> str:
  """Writes JSON; Jinja's own filter escapes for HTML."""
  between = (indent if isinstance(indent, int) else as_text(indent or "")) + (
      as_text(separators or ""))
  spend(as_text(value) + between * nodes(value))
  encoder = json.JSONEncoder(
      ensure_ascii=ensure_ascii, indent=indent, separators=separators,
      sort_keys=sort_keys)
  # Indents grow with the depth, which the estimate above leaves out: so the
  # parts are counted as they come.
  return concat(
      [encoder.encode(value)] if indent is None else encoder.iterencode(value))
