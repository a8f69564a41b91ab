"""Limits of chat templates. Oracles: Jinja's own sandbox, for what a template
may do, and a process with little memory, for what it may not."""

import json
import subprocess
import sys

import jinja2.ext
import jinja2.sandbox
import pytest

from posttrain.text import render, sandbox, template_worker
from tests.text import build, families

MESSAGES = [
    {"role": "user", "content": "hello\nworld", "parts": [1, "a", None]},
    {"role": "assistant", "content": "so <think>\nhm\n</think>\n\n2024"}]


def plain_jinja(source: str) -> str:
  """Renders as transformers does; `{% generation %}` is no tag of Jinja's."""
  environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
      trim_blocks=True, lstrip_blocks=True,
      extensions=[jinja2.ext.loopcontrols])
  environment.filters["tojson"] = lambda x, **kwargs: json.dumps(
      x, ensure_ascii=False, **kwargs)
  environment.globals["strftime_now"] = sandbox.DATE.strftime
  for tag in ("generation", "endgeneration"):
    source = source.replace("{% " + tag + " %}", "")
  return environment.from_string(source).render(**VALUES)


def ours(source: str) -> str:
  text = sandbox.Template(source, "the template t.jinja").render(**VALUES)
  return text.replace(sandbox.TURN_BEGIN, "").replace(sandbox.TURN_END, "")


VALUES = dict(
    messages=MESSAGES, add_generation_prompt=True, tools=None,
    bos_token="<s>", eos_token="</s>")


@pytest.mark.parametrize("name", families.FAMILIES)
def test_published_templates_read_as_in_jinjas_sandbox(name):
  source = families.template(name)
  assert ours(source) == plain_jinja(source)


@pytest.mark.parametrize("source", [
    "{{ messages[::-1]|map(attribute='role')|join(', ') }}",
    "{{ 'a' * 3 ~ 2 ** 10 ~ 7 % 4 ~ [1, 2] + [3] ~ (1, 'x') ~ {'k': none} }}",
    "{{ '%s-%05.2f-%%' % ('a', 3.14159) }}{{ '%(a)s' % {'a': 1} }}",
    "{{ '{}: {:>5}|{x!r}'.format('a', 2, x=messages[0].parts) }}",
    "{{ '%s and %s'|format('a', 'b') }}{{ 'Year 2024: 100000 {} %'|upper }}",
    "{% for a, b in messages[0].items() if a != 'parts' %}{{ loop.index }}"
    "{{ loop.last }}{{ a ~ b }}{% if loop.first %}{% continue %}{% endif %};"
    "{% else %}none{% endfor %}",
    "{% for m in messages recursive %}{{ m.role if m.role else m }}"
    "{% if m.parts %}{{ loop(m.parts) }}{% endif %}{% endfor %}",
    "{% macro f(x, y=2) %}{{ x }}{{ y }}{{ varargs }}{{ kwargs }}{% endmacro %}"
    "{{ f(1) }}{{ f(1, 3, 4, z=5) }}",
    "{% set ns = namespace(n=0, l=[]) %}{% for m in messages %}"
    "{% set ns.n = ns.n + 1 %}{% set ns.l = ns.l + [m.role] %}{% endfor %}"
    "{{ ns.n }}{{ ns.l }}{{ dict(a=1)|tojson }}",
    "{{ messages|tojson(indent=2) }}{{ messages[0]|tojson }}",
    "{{ messages[1].content.split('</think>')[-1].lstrip('\\n') }}"
    "{{ 'a-b'.replace('-', '+') }}{{ 'abc'|replace('b', 'x') }}"
    "{{ ', '.join(['a', 'b']) }}{{ 'a b'.split()|length }}",
    "{% set x %}<{{ messages|length }}>{% endset %}{{ x * 2 }}{{ x|indent(2) }}"
    "{% filter upper %}abc{{ x }}{% endfilter %}",
    "{{ [3, 1, 2]|sort|batch(2)|list }}{{ [1, 2]|sum }}{{ 2.567|round(1) }}"
    "{{ {'b': 1, 'a': 2}|dictsort }}{{ ['a', 'b', 'a']|unique|list }}",
    "{{ messages|selectattr('role', 'equalto', 'user')|list|length }}"
    "{{ 'hello' is string and none is none and 'e' in 'hello' }}"
    "{{ missing|default('d') }}{{ strftime_now('%d %B %Y') }}",
    "{% if 1 / 3 > 0.3 and not 5 // 2 == 3 %}{{ -3|abs }}{{ +1 }}{% endif %}",
])
def test_what_a_template_may_do_is_as_in_jinjas_sandbox(source):
  assert ours(source) == plain_jinja(source)


def test_a_conversation_of_a_million_characters_uses_little():
  """A twentieth of what one rendering may, in the worst of the families."""
  long = dict(VALUES, messages=[
      {"role": ("user", "assistant")[i % 2], "content": "hello " * 83}
      for i in range(2000)])
  for name in families.FAMILIES:
    template = sandbox.Template(families.template(name), name)
    with template_worker.limited(name):
      before = template_worker._WORK.get()
      text = template._template.render(**long)
    assert len(text) > 990_000
    used = template_worker.MOST_WORK - before.left
    assert len(text) < used < template_worker.MOST_WORK / 20


LOOPS = "{% for a in range(100000) %}{% for b in range(100000) %}"
ENDS = "{% endfor %}{% endfor %}"
NS = "{% set ns = namespace(x='a', y=['a'], n=2) %}"
TWICE = NS + "{% for i in range(200) %}{% set ns."
LIMIT = "for one conversation"
# Each would take minutes, or more memory than there is.
BOMBS = {
    "loops": (LOOPS + ENDS, LIMIT),
    "loops with output": (LOOPS + "aaaaaaaaaa" + ENDS, LIMIT),
    "loops with searches": (
        NS + "{% set ns.x = 'ab' * 4000000 %}" + LOOPS +
        "{% if 'ba' * 9 in ns.x %}{% endif %}" + ENDS, LIMIT),
    "loops with slices": (
        NS + "{% set ns.x = 'ab' * 4000000 %}" + LOOPS +
        "{% set y = ns.x[1:] %}" + ENDS, LIMIT),
    "a loop that yields nothing": (
        "{% for a in range(100000) %}{% for b in range(100000) if b < 0 %}" +
        ENDS, LIMIT),
    "recursion": ("{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}"
                  "{% endif %}{% endmacro %}{{ f(60) }}", LIMIT),
    "endless recursion": (
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion"),
    "a long range": ("{{ range(10**9)|list }}", "too big"),
    "many ranges": (LOOPS + "{% set y = range(100000)|list %}" + ENDS, LIMIT),
    "repeated text": ("{{ 'a' * 10**10 }}", LIMIT),
    "repeated list": ("{{ (10**10 * ['a'])|length }}", LIMIT),
    "doubled text": (TWICE + "x = ns.x + ns.x %}{% endfor %}", LIMIT),
    "doubled with ~": (TWICE + "x = ns.x ~ ns.x %}{% endfor %}", LIMIT),
    "doubled in a block": (
        NS + "{% for i in range(200) %}{% set y %}{{ ns.x }}{{ ns.x }}"
        "{% endset %}{% set ns.x = y %}{% endfor %}", LIMIT),
    "doubled by join": (
        TWICE + "x = ns.x.join([ns.x, ns.x]) %}{% endfor %}", LIMIT),
    "doubled by join, a filter": (
        TWICE + "x = [ns.x, ns.x]|join(ns.x) %}{% endfor %}", LIMIT),
    "doubled by replace": (
        TWICE + "x = ns.x.replace('a', 'aa') %}{% endfor %}", LIMIT),
    "replaced at once": (
        "{% set x = 'a' * 9999999 %}{{ x.replace('a', x) }}", LIMIT),
    "replaced by a filter": (
        "{% set x = 'a' * 9999999 %}{{ x|replace('a', x) }}", LIMIT),
    "indented": ("{% set x = '\n' * 999999 %}{{ x|indent(x) }}", LIMIT),
    "doubled by format": (
        TWICE + "x = '{0}{0}'.format(ns.x) %}{% endfor %}", LIMIT),
    "doubled by %": (
        TWICE + "x = '%s%s' % (ns.x, ns.x) %}{% endfor %}", LIMIT),
    "doubled by a filter of format": (
        TWICE + "x = '%s%s'|format(ns.x, ns.x) %}{% endfor %}", LIMIT),
    "a wide field": ("{{ '{:>9999999999}'.format(1) }}", LIMIT),
    "a nested width": ("{{ '{:{w}}'.format(1, w=10**10) }}", LIMIT),
    "a wide %": ("{{ '%9999999999d' % 1 }}", LIMIT),
    "a starred %": ("{{ '%*d' % (9999999999, 1) }}", LIMIT),
    "doubled list": (TWICE + "y = ns.y + ns.y %}{% endfor %}", LIMIT),
    "nested list": (
        TWICE + "y = [ns.y, ns.y] %}{% endfor %}{{ ns.y }}", LIMIT),
    "nested dict": (
        TWICE + "y = {'a': ns.y, 'b': ns.y} %}{% endfor %}{{ ns.y }}", LIMIT),
    "nested call": (
        TWICE + "y = dict(a=ns.y, b=ns.y) %}{% endfor %}"
        "{% if ns.y == dict(a=1) %}{% endif %}", LIMIT),
    "nested arguments": (
        "{% macro f() %}{% if varargs|string|length %}"
        "{{ f(varargs, varargs) }}{% endif %}{% endmacro %}{{ f(1) }}", LIMIT),
    "nested namespaces": (
        "{% set ns = namespace(y=1) %}{% for i in range(100) %}"
        "{% set ns.y = namespace(a=ns.y, b=ns.y) %}{% endfor %}{{ ns.y }}",
        None),
    "JSON of one": (
        "{% set x = ['a' * 9999999] %}{{ [x, x, x, x, x, x]|tojson }}"
        "{{ ([x] * 99)|tojson }}", LIMIT),
    "JSON with an indent": ("{{ [1]|tojson(indent=10**10) }}", LIMIT),
    "JSON with separators": (
        "{{ range(99999)|list|tojson(separators=('a' * 99999, ':')) }}",
        LIMIT),
    "a power": ("{{ 10 ** (10 ** 10) }}", "more than 1024 bits"),
    "a product": (TWICE + "n = ns.n * ns.n %}{% endfor %}",
                  "more than 1024 bits"),
    "a batch": ("{{ [1]|batch(10**10, 'a')|list }}", LIMIT),
    "slices": ("{{ [1]|slice(10**10)|list }}", LIMIT),
    "a sum of lists": ("{{ [[1]]|sum(start=[]) }}", "adds numbers only"),
    "a rounding": ("{{ 1.5|round(10**9, 'ceil') }}", LIMIT),
    "center": ("{{ 'a'.center(10**10) }}", "`center` may make texts of any"),
    "center, a filter": ("{{ 'a'|center(9999999999) }}", "No filter named"),
    "zfill": ("{{ '1'.zfill(10**10) }}", "`zfill` may make texts of any"),
    "expandtabs": ("{{ '\t'.expandtabs(10**10) }}", "`expandtabs` may make"),
    "bytes": ("{{ (1).to_bytes(10**10, 'big') }}", "`to_bytes` may make"),
    "lorem ipsum": ("{{ lipsum(n=10**9) }}", "'lipsum' is undefined"),
    **{f"words by {name}": (
        "{% set x = 'ab ' * 40000000 %}{{ x" + name + "|length }}", LIMIT)
       for name in (".split()", ".split(' ')", ".splitlines()", "|title",
                    "|list", "|sort")},
    "constants": ("{{ " + " ~ ".join(["'a' * 9999999"] * 60) + " }}", LIMIT),
    "depth": ("{{ " + "[" * 5000 + "]" * 5000 + " }}", "nested too deeply"),
    "blocks": ("{% for a in [1] %}" * 60 + "{% endfor %}" * 60,
               "nested too deeply"),
    "a long source": ("a" * 2**21, "2,097,152 characters"),
}

# In a thread, which is not the one that Python takes signals in.
RENDER = """
import json, pathlib, resource, sys, threading, time
from posttrain.text import sandbox, template_worker
template_worker.SECONDS, template_worker.MOST_WORK = (
    float(sys.argv[1]), int(sys.argv[2]))
used = int(pathlib.Path("/proc/self/statm").read_text().split()[0])
limit = used * resource.getpagesize() + 1536 * 2**20
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))

def render(source):
  start = time.thread_time()
  try:
    found = sandbox.Template(source, "t.jinja").render(messages=[])
    found = "rendered " + found[:80]
  except ValueError as error:
    found = str(error)
  print(json.dumps([found, time.thread_time() - start]), flush=True)

for source in json.load(sys.stdin):
  thread = threading.Thread(target=render, args=[source])
  thread.start()
  thread.join()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("seconds, work", [
    (0.2, 2**23),
    pytest.param(template_worker.SECONDS, template_worker.MOST_WORK,
                 marks=pytest.mark.slow)])
def test_bombs_end_with_a_message(seconds, work):
  """Each in seconds of one processor, all within 1.5 GiB."""
  found = subprocess.run(
      [sys.executable, "-c", RENDER, str(seconds), str(work)], timeout=500,
      text=True,
      input=json.dumps([source for source, _ in BOMBS.values()]),
      capture_output=True, check=False)
  lines = [json.loads(line) for line in found.stdout.splitlines()]
  wrong = []
  for (name, (_, message)), (text, spent) in zip(
      BOMBS.items(), lines, strict=False):
    right = text == "rendered <Namespace>" if message is None else (
        text.startswith("t.jinja ") and message in text)
    if not right or spent > seconds + 3:
      wrong.append((name, text[:300], spent))
  assert not wrong
  assert len(lines) == len(BOMBS), found.stderr[-2000:]


def test_the_message_names_the_file(tmp_path):
  path = tmp_path / "mine.jinja"
  path.write_text("{% for m in messages %}{{ m.content * 10**9 }}{% endfor %}")
  renderer = render.make_renderer(build.chatml(), str(path))
  with pytest.raises(sandbox.TemplateLimitError, match=(
      r"mine\.jinja makes more than 134,217,728 characters.*chat_template")):
    renderer.prompt_tokens({"prompt": "hi"})
  path.write_text("{{ 1 / 0 }}")
  renderer = render.make_renderer(build.chatml(), str(path))
  with pytest.raises(ValueError, match=r"mine\.jinja refuses.*division by"):
    renderer.prompt_tokens({"prompt": "hi"})
