"""The sandbox that chat templates run in: Jinja's, with limits.

A template is a program of whoever published it. Jinja's sandbox keeps it from
Python's internals, not from `"a" * 10**10` or loops in loops; `template_work`
counts what it makes and stops it. The count is asked for where Jinja has a
hook (operators, calls, filters, the joining of output), and where it has none
(loops, literals, slices, `~`) by filters that are put into the syntax tree,
under names that no template can write.
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
# Around what a {% generation %} block makes; no valid text has them.
TURN_BEGIN, TURN_END = "\ufdd2", "\ufdd3"

TemplateLimitError = work.TemplateLimitError


class Template:
  """A template of a chat.

  Attributes:
    name: for messages.
  """

  def __init__(self, source: str, name: str):
    """Raises ValueError when the source is not a Jinja template."""
    self.name = name
    if len(source) > LONGEST_SOURCE:
      raise ValueError(
          f"{name} has {len(source):,} characters, and a template may have "
          f"{LONGEST_SOURCE:,}. Check chat_template.")
    try:
      with work.limited(name):  # Constants are computed here.
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
    """The text of a conversation.

    Raises:
      TemplateLimitError: the template does too much for it.
      ValueError: the template fails, or refuses it.
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


@jinja2.pass_context  # So that it is no constant.
def _turn(context: Any, value: Any) -> Any:
  work.spend(work.TURN)
  return value


_HOOKS = {" made": _made, " joined": _joined, " turn": _turn}


class _Hooks(jinja2.visitor.NodeTransformer):
  """Puts the hooks into a template's syntax tree."""

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
  """Jinja's sandbox, whose operations say how large their results are."""

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
        # Called, it is `dict`; as an object it leads nowhere.
        "dict": lambda *args, **kwargs: dict(*args, **kwargs)}

  def _generate(self, source: Any, *args: Any, **kwargs: Any) -> str:
    return super()._generate(_Hooks().visit(source), *args, **kwargs)

  def call_binop(
      self, context: Any, operator: str, left: Any, right: Any) -> Any:
    if operator == "+" and isinstance(left, str) and isinstance(right, str):
      work.spend(len(left) + len(right))  # Most operations of a template.
      return left + right
    work.before_operation(operator, left, right)
    result = self.binop_table[operator](left, right)
    work.check_number(result)
    return result

  # As Jinja names them: a template may pass arguments of any other name.
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
    if not isinstance(owner, dict):  # Of which it was a part.
      work.spend_on(result)
    return result

  def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
    """`str.format`, which the sandbox replaces wherever it is read."""
    inner = super().wrap_str_format(value)
    if inner is None:
      return None

    def bounded(*args: Any, **kwargs: Any) -> str:
      work.before_format(value.__self__, [*args, *kwargs.values()])
      return inner(*args, **kwargs)

    return bounded


def _printed(value: Any) -> Any:
  """What an output is made of; texts count where they are joined."""
  if not isinstance(value, str):
    work.spend(work.as_text(value))
  return value


class _Generation(jinja2.ext.Extension):
  """`{% generation %}...{% endgeneration %}`: marks what it encloses."""

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
    self, *positional = args  # So that a template may call a field `self`.
    fields = dict(*positional, **kwargs)
    for name in fields:
      _check_name(name)
    jinja2.utils.Namespace.__init__(self, fields)

  def __setitem__(self, name: str, value: Any) -> None:
    _check_name(name)
    super().__setitem__(name, value)

  def __repr__(self) -> str:
    return "<Namespace>"  # Not of what is in it, which has no measured size.


def _check_name(name: Any) -> None:
  if isinstance(name, str) and name.startswith("_"):
    raise jinja2.exceptions.SecurityError(
        f"a namespace has no field {name!r}: names with a leading underscore "
        "are not allowed.")


def _raise_exception(message: str):
  raise jinja2.TemplateError(message)
