"""A `tokenizer.json` as a `Tokenizer` (see `posttrain.text.tokenizer`).

Some pipelines put a space before a text (Llama 2, Mistral), at its start
alone ("first") or behind every added token too ("always"). A text that goes
on after other tokens gets none: `encode(text, after=token)`.
"""

import functools
import hashlib
import json
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import tokenizers

from posttrain.text import token_files


class HuggingFaceTokenizer:
  """A `tokenizers.Tokenizer`. See `Tokenizer` for the attributes."""

  def __init__(
      self, tokenizer: tokenizers.Tokenizer, *, bos_id: int | None,
      eos_id: int, stop_ids: Sequence[int] = (),
      chat_template: str | None = None,
      named: Mapping[str, str] | None = None,
  ):
    """`stop_ids` are in addition to EOS; `tokenizer` is copied."""
    self._special = tokenizers.Tokenizer.from_str(tokenizer.to_str())
    # What files may ask for, and no encoding here wants.
    self._special.no_padding()
    self._special.no_truncation()
    self.bos_id, self.eos_id = bos_id, eos_id
    self.stop_ids = tuple(dict.fromkeys((eos_id, *stop_ids)))
    self.chat_template = chat_template
    own = {"bos_token": bos_id, "eos_token": eos_id}
    self.named = {
        key: piece_of(self._special, i) for key, i in own.items()
        if i is not None} | dict(named or {})
    # A stop token that the file does not flag as special would be read out of
    # user text: flag it.
    ends = [i for i in (bos_id, *self.stop_ids) if i is not None]
    self._special.add_special_tokens([
        tokenizers.AddedToken(piece_of(self._special, i), normalized=False)
        for i in ends if i not in _special_ids(self._special)])
    self._plain = _as_text(self._special)
    self._prefix = _prefix_scheme(self._special)
    # By `special`: the pipelines that put no space before a text.
    self._bare = {True: self._special, False: self._plain}
    if self._prefix != "never":
      special = _without_prefix(self._special)
      self._bare = {True: special, False: _as_text(special)}
    vocabulary = self._special.get_vocab(with_added_tokens=True)
    self.vocab_size = max(vocabulary.values()) + 1
    self.controls = {
        piece_of(self._special, i): i for i in _special_ids(self._special)}
    unk = getattr(self._special.model, "unk_token", None)
    self.unk_id = None if unk is None else self._special.token_to_id(unk)
    self._keep_text_plain()
    # Decoders strip a leading space at the start of a sequence only, so
    # `token_text` decodes a token behind this one.
    self._probe = self.encode("a")
    self._probe_length = len(self.decode(self._probe))

  def encode(
      self, text: str, *, special: bool = False, after: int | None = None,
  ) -> list[int]:
    """Token ids; special tokens are parsed with `special` only."""
    whole = self._special if special else self._plain
    if after is None or self._prefix == "never":
      return _ids(whole, text)
    bare = self._bare[special]
    if self._prefix == "first":
      return _ids(bare, text)
    if after in self._added.values():
      return _ids(whole, text)
    # Up to the first added token there is no space, and behind it there is.
    parsed = [token for token in self._added
              if special or token not in self.controls]
    head = next(iter(token_files.splitter(parsed)(text)), "")
    if head in parsed:
      return _ids(whole, text)
    return _ids(bare, head) + _ids(whole, text[len(head):])

  def _keep_text_plain(self) -> None:
    """Merges must not put a control token together out of a user's text.

    The text of one alone decides: a merge across its edge would leave it in
    parts.
    """
    found = self._read_from_text()
    if found:
      self._plain = _as_text(_without_merges(self._plain, found))
      self._bare[False] = _as_text(_without_merges(self._bare[False], found))
    found = self._read_from_text() if found else []
    if found:
      raise ValueError(
          f"the tokenizer reads {', '.join(found)} out of plain text, so that "
          "a user could write control tokens.")

  def _read_from_text(self) -> list[str]:
    controls = set(self.controls.values())
    bare = self._bare[False]
    return [text for text in self.controls if controls & set(_ids(bare, text))]

  @functools.cached_property
  def _added(self) -> dict[str, int]:
    decoder = self._special.get_added_tokens_decoder()
    return {token.content: i for i, token in decoder.items()}

  def decode(
      self, ids: Sequence[int], *, skip_special: bool = False) -> str:
    """Text; bytes that are not UTF-8 become U+FFFD."""
    return self._special.decode(
        [int(i) for i in ids], skip_special_tokens=skip_special)

  def token_text(self, token: int) -> str:
    """The text of one token; its vocabulary entry if it is a part of one."""
    text = self.decode([*self._probe, int(token)])[self._probe_length:]
    if "\ufffd" in text:
      return piece_of(self._special, int(token))
    return text

  def fingerprint(self) -> str:
    """sha256 of the vocabulary, rules and special ids."""
    contents = json.dumps(
        [self._special.to_str(), self.bos_id, self.eos_id, self.stop_ids])
    return hashlib.sha256(contents.encode()).hexdigest()

  def save(self, directory: str | pathlib.Path) -> None:
    """Writes what `load(directory)` needs, under the usual file names."""
    directory = pathlib.Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    self._special.save(str(directory / "tokenizer.json"))
    # The class of transformers that takes the file as it is; a family's own
    # would rebuild parts of it.
    token_files.write(
        directory, self, tokenizer_class="PreTrainedTokenizerFast")


def piece_of(tokenizer: tokenizers.Tokenizer, token: int) -> str:
  """The vocabulary entry of an id.

  Raises:
    ValueError: there is none.
  """
  piece = tokenizer.id_to_token(token)
  if piece is None:
    raise ValueError(
        f"the vocabulary of {tokenizer.get_vocab_size()} tokens has no id "
        f"{token}.")
  return piece


def _ids(tokenizer: tokenizers.Tokenizer, text: str) -> list[int]:
  return tokenizer.encode(text, add_special_tokens=False).ids


def _as_text(tokenizer: tokenizers.Tokenizer) -> tokenizers.Tokenizer:
  """A copy that reads control tokens in a text as text."""
  copy = tokenizers.Tokenizer.from_str(tokenizer.to_str())
  copy.encode_special_tokens = True  # The library's name for it.
  return copy


def _special_ids(tokenizer: tokenizers.Tokenizer) -> list[int]:
  decoder = tokenizer.get_added_tokens_decoder()
  return [i for i, token in decoder.items() if token.special]


def _steps(component: dict | None) -> Iterator[dict]:
  """The steps of a serialised normalizer or pre-tokenizer, in order."""
  if component is None:
    return
  inner = component.get("normalizers", component.get("pretokenizers"))
  if inner is None:
    yield component
  for step in inner or ():
    yield from _steps(step)


def _state(component: Any) -> dict | None:
  return None if component is None else json.loads(component.__getstate__())


def _prefix_scheme(tokenizer: tokenizers.Tokenizer) -> str:
  """Where a space is put before a text: "never", "first" or "always"."""
  found = {"never"}
  for step in (*_steps(_state(tokenizer.normalizer)),
               *_steps(_state(tokenizer.pre_tokenizer))):
    if step["type"] == "Metaspace":
      found.add(step["prepend_scheme"])
    elif step["type"] == "Prepend" or step.get("add_prefix_space"):
      found.add("always")
  return max(found, key=("never", "first", "always").index)


def _without_prefix(tokenizer: tokenizers.Tokenizer) -> tokenizers.Tokenizer:
  spec = json.loads(tokenizer.to_str())
  for step in _steps(spec["pre_tokenizer"]):
    if step["type"] == "Metaspace":
      step["prepend_scheme"] = "never"
    elif "add_prefix_space" in step:
      step["add_prefix_space"] = False
  kept = [step for step in _steps(spec["normalizer"])
          if step["type"] != "Prepend"]
  spec["normalizer"] = dict(type="Sequence", normalizers=kept) if kept else None
  return tokenizers.Tokenizer.from_str(json.dumps(spec))


def _without_merges(
    tokenizer: tokenizers.Tokenizer, results: Sequence[str],
) -> tokenizers.Tokenizer:
  """A copy that merges nothing into one of `results`."""
  spec = json.loads(tokenizer.to_str())
  model = spec["model"]
  if "merges" in model:  # A Unigram model has none.
    model["merges"] = [
        pair for pair in model["merges"] if "".join(pair) not in set(results)]
  return tokenizers.Tokenizer.from_str(json.dumps(spec))


def prefix_at_start_only(
    tokenizer: tokenizers.Tokenizer) -> tokenizers.Tokenizer:
  """A Llama 2 pipeline as `"legacy": false` beside it means it.

  The file itself, older than that setting, puts a space behind every added
  token too. Other pipelines are returned as they are.
  """
  steps = list(_steps(_state(tokenizer.normalizer)))
  if [step["type"] for step in steps] != ["Prepend", "Replace"]:
    return tokenizer
  copy = tokenizers.Tokenizer.from_str(tokenizer.to_str())
  copy.normalizer = None
  copy.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace(
      prepend_scheme="first", split=False)
  return copy


def without_added(
    tokenizer: tokenizers.Tokenizer, first: int) -> tokenizers.Tokenizer:
  """A copy without the added tokens from the id `first` on."""
  if max(tokenizer.get_added_tokens_decoder(), default=0) < first:
    return tokenizer
  spec = json.loads(tokenizer.to_str())
  spec["added_tokens"] = [
      token for token in spec["added_tokens"] if token["id"] < first]
  return tokenizers.Tokenizer.from_str(json.dumps(spec))
