"""Hugging Face tokenizer: a `tokenizer.json` as a `Tokenizer`.

Some pipelines put a space before a text (Llama 2, Mistral): only at its start
("first"), or also after every added token ("always"). A text that continues
other tokens gets none: `encode(text, after=token)`.
"""

import functools
import hashlib
import json
import pathlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence

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
    """Copies the tokenizer; `stop_ids` are in addition to EOS."""
    self._special = tokenizers.Tokenizer.from_str(tokenizer.to_str())
    # Files may ask for both, which would change the ids of a text.
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
    # Pipelines that put no space before a text, by `special`.
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
    self._bytes_of = _bytes_of_pieces(self._special)
    self.words = self._bytes_of is None
    self._keep_text_plain()
    # Decoders strip a leading space at the start of a sequence only, so
    # `token_text` decodes a token after this one.
    self._probe = self.encode("a")
    self._probe_length = len(self.decode(self._probe))

  def encode(
      self, text: str, *, special: bool = False, after: int | None = None,
  ) -> list[int]:
    """Encodes a text; control tokens in it are parsed with `special` only."""
    whole = self._special if special else self._plain
    if after is None or self._prefix == "never":
      return _ids(whole, text)
    bare = self._bare[special]
    if self._prefix == "first":
      return _ids(bare, text)
    if after in self._added.values():
      return _ids(whole, text)
    # Up to the first added token there is no space, and after it there is.
    parsed = [token for token in self._added
              if special or token not in self.controls]
    head = next(iter(token_files.splitter(parsed)(text)), "")
    if head in parsed:
      return _ids(whole, text)
    return _ids(bare, head) + _ids(whole, text[len(head):])

  def _keep_text_plain(self) -> None:
    """Removes merges that would make a control token of a user's text.

    Only the text of a control token alone is tested: with other text next to
    it, a merge across its edge would leave it in parts.
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
    """Decodes to text; bytes that are not UTF-8 become U+FFFD."""
    return self._special.decode(
        [int(i) for i in ids], skip_special_tokens=skip_special)

  def token_text(self, token: int) -> str:
    """Returns a token's text; its vocabulary entry if it is a part of a
    character.
    """
    text = self.decode([*self._probe, int(token)])[self._probe_length:]
    if "\ufffd" in text:
      return piece_of(self._special, int(token))
    return text

  def token_bytes(self, token: int) -> bytes:
    """Returns the bytes that a token adds to a text, a leading space too.

    Control tokens, the unknown token and ids without an entry have none.
    """
    token = int(token)
    piece = self._pieces.get(token)
    if piece is None or piece in self.controls or token == self.unk_id:
      return b""
    if self._bytes_of is None or piece in self._added:
      return piece.encode()
    return self._bytes_of(piece)

  @functools.cached_property
  def _pieces(self) -> dict[int, str]:
    vocabulary = self._special.get_vocab(with_added_tokens=True)
    return {i: piece for piece, i in vocabulary.items()}

  def fingerprint(self) -> str:
    """Computes the sha256 of the vocabulary, rules and special ids."""
    contents = json.dumps(
        [self._special.to_str(), self.bos_id, self.eos_id, self.stop_ids])
    return hashlib.sha256(contents.encode()).hexdigest()

  def save(self, directory: str | pathlib.Path) -> None:
    """Writes the files that `load(directory)` reads, under their usual names.
    """
    directory = pathlib.Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    self._special.save(str(directory / "tokenizer.json"))
    # This class of transformers takes the file as it is; a family's own class
    # would rebuild parts of it.
    token_files.write(
        directory, self, tokenizer_class="PreTrainedTokenizerFast")


def piece_of(tokenizer: tokenizers.Tokenizer, token: int) -> str:
  """Returns the vocabulary entry of an id.

  Raises:
    ValueError: the vocabulary has no such id.
  """
  piece = tokenizer.id_to_token(token)
  if piece is None:
    raise ValueError(
        f"the vocabulary of {tokenizer.get_vocab_size()} tokens has no id "
        f"{token}.")
  return piece


def _bytes_of_pieces(
    tokenizer: tokenizers.Tokenizer) -> Callable[[str], bytes] | None:
  """Makes a function from a vocabulary entry to the bytes that it stands for.

  It does what the decoder does with a token inside of a text. None if the
  decoder puts spaces between tokens.
  """
  steps = list(_steps(json.loads(tokenizer.to_str())["decoder"]))
  kinds = {step["type"] for step in steps}
  if "ByteLevel" in kinds:
    return _bytes_of_letters
  if not kinds & {"Metaspace", "Replace"}:
    return None
  spaces = [
      (step["pattern"].get("String"), step["content"])
      if step["type"] == "Replace" else (step["replacement"], " ")
      for step in steps if step["type"] in ("Metaspace", "Replace")]

  def of_piece(piece: str) -> bytes:
    if "ByteFallback" in kinds and re.fullmatch("<0x[0-9A-F]{2}>", piece):
      return bytes([int(piece[3:-1], 16)])
    for mark, text in spaces:
      piece = piece.replace(mark, text) if mark else piece
    return piece.encode()

  return of_piece


def _bytes_of_letters(piece: str) -> bytes:
  """Reads an entry in which each byte is written as a letter (GPT-2)."""
  try:
    return piece.translate(_BYTE_OF_LETTER).encode("latin-1")
  except UnicodeEncodeError:
    return piece.encode()


def _letters() -> dict[int, int]:
  """Makes GPT-2's table: code of a letter -> byte.

  Printable characters of Latin-1 stand for themselves, the other bytes for the
  letters from U+0100 on.
  """
  plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
  others = [i for i in range(256) if i not in set(plain)]
  # A letter that is none of the 256 must not pass for a byte.
  return dict.fromkeys(range(256), 0x100) | {i: i for i in plain} | {
      0x100 + i: byte for i, byte in enumerate(others)}


_BYTE_OF_LETTER = _letters()


def _ids(tokenizer: tokenizers.Tokenizer, text: str) -> list[int]:
  return tokenizer.encode(text, add_special_tokens=False).ids


def _as_text(tokenizer: tokenizers.Tokenizer) -> tokenizers.Tokenizer:
  """Copies a tokenizer, to read control tokens in a text as text."""
  copy = tokenizers.Tokenizer.from_str(tokenizer.to_str())
  copy.encode_special_tokens = True  # The library's name for it.
  return copy


def _special_ids(tokenizer: tokenizers.Tokenizer) -> list[int]:
  decoder = tokenizer.get_added_tokens_decoder()
  return [i for i, token in decoder.items() if token.special]


def _steps(component: dict | None) -> Iterator[dict]:
  """Yields the steps of a serialised part of a pipeline, in order."""
  if component is None:
    return
  inner = next((component[name] for name in (
      "normalizers", "pretokenizers", "decoders") if name in component), None)
  if inner is None:
    yield component
  for step in inner or ():
    yield from _steps(step)


def _prefix_scheme(tokenizer: tokenizers.Tokenizer) -> str:
  """Finds where a space is put before a text: "never", "first" or "always"."""
  found, spec = {"never"}, json.loads(tokenizer.to_str())
  for step in (*_steps(spec["normalizer"]), *_steps(spec["pre_tokenizer"])):
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
  """Copies a tokenizer without the merges that result in one of `results`."""
  spec = json.loads(tokenizer.to_str())
  model = spec["model"]
  if "merges" in model:  # A Unigram model has none.
    model["merges"] = [
        pair for pair in model["merges"] if "".join(pair) not in set(results)]
  return tokenizers.Tokenizer.from_str(json.dumps(spec))


def prefix_at_start_only(
    tokenizer: tokenizers.Tokenizer) -> tokenizers.Tokenizer:
  """Reads a Llama 2 pipeline as `"legacy": false` in its config means it.

  The file itself is older than that setting, and puts a space after every added
  token too. Other pipelines are returned as they are.
  """
  steps = list(_steps(json.loads(tokenizer.to_str())["normalizer"]))
  if [step["type"] for step in steps] != ["Prepend", "Replace"]:
    return tokenizer
  copy = tokenizers.Tokenizer.from_str(tokenizer.to_str())
  copy.normalizer = None
  copy.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace(
      prepend_scheme="first", split=False)
  return copy


def without_added(
    tokenizer: tokenizers.Tokenizer, first: int) -> tokenizers.Tokenizer:
  """Copies a tokenizer without its added tokens from the id `first` on."""
  if max(tokenizer.get_added_tokens_decoder(), default=0) < first:
    return tokenizer
  spec = json.loads(tokenizer.to_str())
  spec["added_tokens"] = [
      token for token in spec["added_tokens"] if token["id"] < first]
  return tokenizers.Tokenizer.from_str(json.dumps(spec))
