"""Every family's template, rendered here and by transformers.

transformers reads the same files with the class that it has for the family.
"""

import datetime

import pytest

from posttrain.text import chat, sandbox
from posttrain.text import tokenizer as tokenizer_lib
from tests.text import families

transformers = pytest.importorskip("transformers")

USER = {"role": "user", "content": "  hello <|im_end|>\n<end_of_turn> 42? \n"}
ANSWER = {"role": "assistant", "content": "\n\n The answer is 42. "}
THOUGHT = {"role": "assistant",
           "content": "<think>\nhm, 中文\n</think>\n\nIt is 42."}
NAMED = {"role": "assistant", "content": "It is 42.", "thinking": "hm\n"}
SYSTEM = {"role": "system", "content": " Be brief. /no_think\n"}
TALKS = {
    "one user": [USER],
    "two turns": [USER, ANSWER, USER, ANSWER],
    "open": [USER, ANSWER, USER],
    "system": [SYSTEM, USER, ANSWER],
    "reasoning": [USER, THOUGHT, USER, THOUGHT],
    "reasoning in a field": [USER, NAMED, USER, NAMED],
    "two users": [USER, USER],
}


@pytest.fixture(scope="module", params=families.FAMILIES)
def release(request, tmp_path_factory):
  directory = families.write(
      tmp_path_factory.mktemp("release"), request.param)
  ours = tokenizer_lib.load(directory)
  theirs = transformers.AutoTokenizer.from_pretrained(directory)
  return chat.ChatTemplate(ours.chat_template, ours), theirs


@pytest.fixture(autouse=True)
def same_day(monkeypatch):
  """A prompt here is the same on every day; transformers asks the clock."""
  class Clock(datetime.datetime):

    @classmethod
    def now(cls, tz=None):
      return sandbox.DATE

  monkeypatch.setattr(
      "transformers.utils.chat_template_utils.datetime", Clock)


def outcome(render):
  try:
    return render()
  except Exception as error:
    return f"refused: {str(error).rpartition(': ')[2]}"


@pytest.mark.parametrize("generation", [False, True])
@pytest.mark.parametrize("name", TALKS)
def test_renders_are_equal(release, name, generation):
  template, theirs = release
  want = outcome(lambda: theirs.apply_chat_template(
      TALKS[name], tokenize=False, add_generation_prompt=generation))
  got = outcome(lambda: template.render(TALKS[name], generation))
  assert got == want


def test_tokens_of_a_prompt_are_equal(release):
  """Without control tokens in the messages, which are text here alone."""
  template, theirs = release
  talk = [{"role": "user", "content": "hello 42?"},
          {"role": "assistant", "content": "world"},
          {"role": "user", "content": "  中文\n\n👩‍👩‍👧 it's"}]
  want = theirs.apply_chat_template(
      talk, add_generation_prompt=True, return_dict=False)
  assert template.prompt_tokens(talk) == want


SOURCES = [
    "{{ {'b': '<é>', 'a': [1, 2]} | tojson }}",
    "{{ {'b': 1, 'a': 2} | tojson(indent=2, sort_keys=True) }}",
    "{{ [1, 'é'] | tojson(ensure_ascii=True, separators=(',', ':')) }}",
    "{% for m in messages %}{% if loop.index0 == 1 %}{% break %}{% endif %}\n"
    "  {{ m['role'] }}  \n{% endfor %}\n",
    "{{ strftime_now('%d %b %Y') }}",
    "{% set ns = namespace(a=1) %}{% set ns.a = ns.a + 1 %}{{ ns.a }}",
    "{% set ns = namespace(_a=1) %}", "{% set ns = namespace(self=1) %}x",
    "{{ dict(a=1) }}", "{{ dict.__class__ }}", "{{ undefined_name }}",
    "{{ ''.__class__.__mro__ }}", "{{ messages.append(1) }}",
    "{{ raise_exception('no') }}", "{{ messages[0].missing.too }}",
    "{% generation %}{{ messages[0]['role'] }}{% endgeneration %}",
    "{{ bos_token }}|{{ eos_token }}", "{{ range(3) | list }}",
]


@pytest.mark.parametrize("source", SOURCES)
def test_what_a_template_may_use_is_the_same(release, source):
  template, theirs = release
  ours = chat.ChatTemplate(source, template._tokenizer)
  talk = TALKS["two turns"]
  want = outcome(lambda: theirs.apply_chat_template(
      talk, chat_template=source, tokenize=False))
  got = outcome(lambda: ours.render(talk, False))
  assert got.startswith("refused") == want.startswith("refused"), (got, want)
  if not got.startswith("refused"):
    assert got == want
