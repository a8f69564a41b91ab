"""Sandbox for chat templates: Jinja's own, with limits on work and size.

A template is a program of whoever published it. Jinja's sandbox keeps it from
Python's internals, but not from `"a" * 10**10` or loops in loops.
`template_worker` counts the size of its results, and stops it. Where Jinja has
a hook (operators, calls, filters, the joining of output) the count is taken
there. Where it has none (loops, literals, slices, `~`) filters are put into the
syntax tree, under names that no template can write.
"""

import datetime
from collections.abc import Callable
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.runtime
import jinja2.sandbox
import jinja2.utils
import jinja2.visitor

from posttrain.text import template_worker as work

LONGEST_SOURCE = 2**20
DATE = datetime.datetime(2024, 7, 26)
# These enclose the text of a {% generation %} block; no valid text has them.
TURN_BEGIN, TURN_END = "\ufdd2", "\ufdd3"

TemplateLimitError = work.TemplateLimitError


class Template:
  """Compiles a chat template, and renders conversations with it.

  Attributes:
    name: names it in error messages.
  """

  def __init__(self, source: str, name: str):
    """Compiles the source; raises ValueError if it is not a Jinja template."""
    self.name = name
    if len(source) > LONGEST_SOURCE:
      raise ValueError(
          f"{name} has {len(source):,} characters, and a template may have "
          f"{LONGEST_SOURCE:,}. Check chat_template.")
    try:
      # Jinja computes constant expressions when it compiles.
      with work.limited(name):
        self._template = _Environment().from_string(source)
    except jinja2.TemplateSyntaxError as error:
      raise ValueError(
          f"{name} is not valid Jinja: line {error.lineno}: {error.message}. "
          "Check chat_template.") from error
    except (RecursionError, SyntaxError, MemoryError) as error:
      raise ValueError(
          f"{name} cannot be compiled ({error}): it is nested too deeply. "
          "Check chat_template.") from error

  def render(self, **values: Any) -> str:
    """Renders the text of a conversation.

    Raises:
      TemplateLimitError: the template exceeds its allowance.
      ValueError: the template fails, or refuses the conversation.
    """
    try:
      with work.limited(self.name):
        return self._template.render(**values)
    except TemplateLimitError:
      raise
    # A template is a program: it can fail in any way, as `1 / 0` does.
    except Exception as error:
      reason = str(error) or type(error).__name__
      raise ValueError(
          f"{self.name} refuses these messages: {reason}") from error


def _made(value: Any) -> Any:
  work.spend_on(value)
  return value


def _joined(value: Any) -> Any:
  work.spend(work.as_text(value))
  return value


@jinja2.pass_context  # Otherwise Jinja computes it once, when it compiles.
def _turn(context: Any, value: Any) -> Any:
  work.spend(work.TURN)
  return value


_HOOKS = {" made": _made, " joined": _joined, " turn": _turn}


class _Hooks(jinja2.visitor.NodeTransformer):
  """Puts the counting filters into a template's syntax tree."""

  def visit_For(self, node: Any) -> Any:
    self.generic_visit(node)
    turn = _hook(" turn", jinja2.nodes.Const(True, lineno=node.lineno))
    node.body.insert(0, jinja2.nodes.ExprStmt(turn, lineno=node.lineno))
    if node.test is not None:
      node.test = jinja2.nodes.And(turn, node.test, lineno=node.lineno)
    return node

  def visit_List(self, node: Any) -> Any:
    return _hook(" made", self.generic_visit(node))

  visit_Dict = visit_List

  def visit_Tuple(self, node: Any) -> Any:
    self.generic_visit(node)
    return _hook(" made", node) if node.ctx == "load" else node

  def visit_Getitem(self, node: Any) -> Any:
    self.generic_visit(node)
    sliced = isinstance(node.arg, jinja2.nodes.Slice)
    return _hook(" made", node) if sliced else node

  def visit_Concat(self, node: Any) -> Any:
    self.generic_visit(node)
    node.nodes = [_hook(" joined", each) for each in node.nodes]
    return node


def _hook(name: str, node: Any) -> jinja2.nodes.Filter:
  return jinja2.nodes.Filter(
      node, name, [], [], None, None, lineno=node.lineno)


class _Environment(jinja2.sandbox.ImmutableSandboxedEnvironment):
  """Jinja's sandbox, with operations that count the size of their results."""

  intercepted_binops = frozenset(("+", "*", "**", "%"))
  concat = staticmethod(work.concat)

  def __init__(self) -> None:
    super().__init__(
        trim_blocks=True, lstrip_blocks=True, finalize=_printed,
        extensions=[_Generation, jinja2.ext.loopcontrols])
    self.filters = {
        name: work.bounded(name, function)
        for name, function in self.filters.items()
        if name not in work.REFUSED_FILTERS} | {
            "tojson": work.tojson, **_HOOKS}
    del self.globals["lipsum"]
    self.globals |= {
        "raise_exception": _raise_exception, "strftime_now": DATE.strftime,
        "namespace": _Namespace,
        # A function rather than the type, whose attributes lead to others.
        "dict": lambda *args, **kwargs: dict(*args, **kwargs)}

  def _generate(self, source: Any, *args: Any, **kwargs: Any) -> str:
    return super()._generate(_Hooks().visit(source), *args, **kwargs)

  def call_binop(
      self, context: Any, operator: str, left: Any, right: Any) -> Any:
    if operator == "+" and isinstance(left, str) and isinstance(right, str):
      # A short way for the most frequent operation.
      work.spend(len(left) + len(right))
      return left + right
    work.before_operation(operator, left, right)
    result = self.binop_table[operator](left, right)
    work.check_number(result)
    return result

  # Jinja's own names of the parameters: a template may pass keyword arguments
  # of any other name.
  def call(
      __self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:
    work.spend(work.TURN)
    owner = getattr(__obj, "__self__", None)
    if isinstance(owner, (str, int)):
      args = work.before_method(owner, __obj.__name__, args)
    elif isinstance(__obj, jinja2.runtime.Macro) and (
        __obj.catch_varargs or __obj.catch_kwargs):
      work.spend(work.nodes([*args, *kwargs.values()]))
    result = super().call(__context, __obj, *args, **kwargs)
    # What a dict's method returns is a part of the dict, and was counted.
    if not isinstance(owner, dict):
      work.spend_on(result)
    return result

  def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
    """Limits `str.format`, which the sandbox replaces wherever it is read."""
    inner = super().wrap_str_format(value)
    if inner is None:
      return None

    def bounded(*args: Any, **kwargs: Any) -> str:
      work.before_format(value.__self__, [*args, *kwargs.values()])
      return inner(*args, **kwargs)

    return bounded


def _printed(value: Any) -> Any:
  """Counts an output that is no text; texts are counted when they are joined.
  """
  if not isinstance(value, str):
    work.spend(work.as_text(value))
  return value


class _Generation(jinja2.ext.Extension):
  """`{% generation %}...{% endgeneration %}`: marks the text that it encloses.
  """

  tags = {"generation"}  # noqa: RUF012 (as the base class declares it)

  def parse(self, parser: Any) -> jinja2.nodes.Node:
    line = next(parser.stream).lineno
    body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
    call = self.call_method("_mark")
    return jinja2.nodes.CallBlock(call, [], [], body).set_lineno(line)

  def _mark(self, caller: Any) -> str:
    return TURN_BEGIN + caller() + TURN_END


class _Namespace(jinja2.utils.Namespace):
  """`namespace()`, closed to names that reach into Python's internals."""

  def __init__(*args: Any, **kwargs: Any):
    self, *positional = args  # A template may have a field named `self`.
    fields = dict(*positional, **kwargs)
    for name in fields:
      _check_name(name)
    jinja2.utils.Namespace.__init__(self, fields)

  def __setitem__(self, name: str, value: Any) -> None:
    _check_name(name)
    super().__setitem__(name, value)

  def __repr__(self) -> str:
    return "<Namespace>"  # Its content was not counted, and may be large.


def _check_name(name: Any) -> None:
  if isinstance(name, str) and name.startswith("_"):
    raise jinja2.exceptions.SecurityError(
        f"a namespace has no field {name!r}: names with a leading underscore "
        "are not allowed.")


def _raise_exception(message: str):
  raise jinja2.TemplateError(message)
