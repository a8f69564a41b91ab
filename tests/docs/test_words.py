"""Plain words: what is said here can be searched for, by the field's terms.

A docstring opens with a verb and its object or with a term's name; a paragraph
or a table cell of the docs, the description of a config key among them
(docs/configs.md is generated), opens with a noun or a verb too. Some private
words of earlier versions are not to come back.
"""

import ast
import pathlib
import re
from collections.abc import Iterator

ROOT = pathlib.Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
SOURCES = sorted((ROOT / "posttrain").rglob("*.py"))

# Openings that make a reader wait for the subject.
EVERYWHERE = ("Of", "What", "So many")
IN_DOCSTRINGS = (*EVERYWHERE, "As", "How", "Where", "Whether", "Who")

# Private words (patterns), and the words that a paper or vLLM would index.
PRIVATE = {
    r"draw(s|n|ing)? ahead": "asynchronous rollouts, off-policy lag",
    r"refilled": "continuous batching",
    r"lies? behind": "shares one copy of its prompt",
    r"steering": "sampling options",
    r"roll[ _]call": "rendezvous",
    r"hosts? looks?": "the host syncs",
    r"is turned": "is transposed",
    r"max_slots": "max_seq_len",
    r"grpo_parts|stages[./]grpo": "the module's name today",
}


def docstrings(path: pathlib.Path) -> Iterator[tuple[int, str]]:
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)):
      yield getattr(node, "lineno", 1), ast.get_docstring(node) or ""


def openings(path: pathlib.Path) -> Iterator[tuple[int, str]]:
  """The first words of a page's paragraphs, list items and table cells."""
  fenced, before = False, ""
  for number, line in enumerate(path.read_text().splitlines(), 1):
    if line.lstrip().startswith("```"):
      fenced = not fenced
    elif not fenced and not line.startswith(("#", "    ")):
      begins = not before.strip() or re.match(r" *([-*]|\d+\.) |\|", line)
      for cell in line.split("|") if begins else ():
        yield number, re.sub(r"^[ *>_-]*(\d+\. )?", "", cell)
    before = line


def opens_with(text: str, words: tuple[str, ...]) -> str | None:
  return next((word for word in words if re.match(
      rf"{word}\b(?!-)", text)), None)


def test_openings_name_what_follows():
  found = [
      f"{path.relative_to(ROOT)}:{line}: opens with {word!r}: {text[:50]!r}"
      for paths, texts, words in (
          (SOURCES, docstrings, IN_DOCSTRINGS), (PAGES, openings, EVERYWHERE))
      for path in paths for line, text in texts(path)
      if (word := opens_with(text, words))]
  assert not found, "\n".join(
      [*found, "Open with a verb and its object, or with the term's name."])


def test_words_are_those_of_the_field():
  found = [
      f"{path.relative_to(ROOT)}:{number}: {match[0]!r}; say: {word}"
      for path in (*SOURCES, *PAGES)
      for number, line in enumerate(path.read_text().splitlines(), 1)
      for pattern, word in PRIVATE.items()
      if (match := re.search(rf"\b({pattern})\b", line, re.IGNORECASE))]
  assert not found, "\n".join(found)
