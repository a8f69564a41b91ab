"""Tokenizers: SentencePiece and Hugging Face `tokenizer.json`, one interface.

Two kinds of text reach a tokenizer. A chat template's own text may name
control tokens (`<|im_end|>`), and `encode(text, special=True)` turns them into
their ids. Everything else (prompts, completions, message content) is encoded
with `special=False`, where the same characters are ordinary text: a user
cannot end a turn by typing its name. Symbols that are not control tokens
(`<think>` as a plain vocabulary entry) are recognised in both.

No BOS or EOS is ever added here; `posttrain.text.render` does that once.
"""

import hashlib
import json
import pathlib
import re
from collections.abc import Iterable, Sequence
from typing import Protocol

import numpy as np
import sentencepiece
import tokenizers


class Tokenizer(Protocol):
  """What the rest of the code knows about a tokenizer.

  Attributes:
    vocab_size: ids are in [0, vocab_size).
    bos_id: the id that every sequence begins with; None where the family has
      none (Qwen, SmolLM2).
    eos_id: ends a completion.
    stop_ids: EOS and the other ids at which sampling stops (end of turn).
    unk_id: stands for text that the vocabulary cannot spell, or None.
    controls: control tokens, text -> id.
    chat_template: Jinja source, or None.
  """

  vocab_size: int
  bos_id: int | None
  eos_id: int
  stop_ids: tuple[int, ...]
  unk_id: int | None
  controls: dict[str, int]
  chat_template: str | None

  def encode(self, text: str, *, special: bool = False) -> list[int]: ...

  def decode(
      self, ids: Sequence[int], *, skip_special: bool = False) -> str: ...

  def token_text(self, token: int) -> str: ...

  def fingerprint(self) -> str: ...

  def save(self, directory: str | pathlib.Path) -> None: ...


class SentencePieceTokenizer:
  """A SentencePiece model. See `Tokenizer` for the attributes."""

  def __init__(self, proto: bytes, chat_template: str | None = None):
    """Raises ValueError when the model has no EOS piece."""
    self._proto = proto
    self._model = sentencepiece.SentencePieceProcessor(model_proto=proto)
    self.vocab_size = len(self._model)
    self.eos_id = self._model.eos_id()
    if self.eos_id < 0:
      raise ValueError(
          "the SentencePiece model has no EOS piece (eos_id=-1), and a "
          "completion needs one to end. Train it with an EOS id.")
    bos = self._model.bos_id()
    self.bos_id: int | None = bos if bos >= 0 else None
    self.unk_id: int | None = self._model.unk_id()
    self.stop_ids: tuple[int, ...] = (self.eos_id,)
    self.chat_template = chat_template
    self.controls = {
        self._model.id_to_piece(i): i for i in range(self.vocab_size)
        if self._model.is_control(i)}
    self._split = _splitter(self.controls)

  def encode(self, text: str, *, special: bool = False) -> list[int]:
    """Token ids; control pieces are parsed with `special` only."""
    if not special:
      return self._model.encode(text)
    ids: list[int] = []
    for part in self._split(text):
      control = self.controls.get(part)
      ids += self._model.encode(part) if control is None else [control]
    return ids

  def decode(
      self, ids: Sequence[int], *, skip_special: bool = False) -> str:
    """Text; SentencePiece itself would drop control pieces silently."""
    parts: list[str] = []
    run: list[int] = []
    for token in map(int, ids):
      if not self._model.is_control(token):
        run.append(token)
        continue
      parts.append(self._model.decode(run))
      run = []
      if not skip_special:
        parts.append(self._model.id_to_piece(token))
    parts.append(self._model.decode(run))
    return "".join(parts)

  def token_text(self, token: int) -> str:
    """The text of one token, its leading space included."""
    piece = self._model.id_to_piece(int(token))
    if self._model.is_byte(int(token)):
      value = int(piece[3:-1], 16)  # "<0x0A>"
      return chr(value) if value < 128 else piece
    return piece.replace("\u2581", " ")

  def fingerprint(self) -> str:
    """sha256 of the model file."""
    return hashlib.sha256(self._proto).hexdigest()

  def save(self, directory: str | pathlib.Path) -> None:
    """Writes what `load(directory)` needs."""
    directory = pathlib.Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "tokenizer.model").write_bytes(self._proto)
    if self.chat_template is not None:
      (directory / "chat_template.jinja").write_text(
          self.chat_template, encoding="utf-8")


class HuggingFaceTokenizer:
  """A `tokenizers.Tokenizer`. See `Tokenizer` for the attributes."""

  def __init__(
      self, tokenizer: tokenizers.Tokenizer, *, bos_id: int | None,
      eos_id: int, stop_ids: Sequence[int] = (),
      chat_template: str | None = None,
  ):
    """`stop_ids` are in addition to EOS; `tokenizer` is copied."""
    self._special = tokenizers.Tokenizer.from_str(tokenizer.to_str())
    self.bos_id, self.eos_id = bos_id, eos_id
    self.stop_ids = tuple(dict.fromkeys((eos_id, *stop_ids)))
    self.chat_template = chat_template
    # A stop token that the file does not flag as special would be read out of
    # user text: flag it.
    named = [i for i in (bos_id, *self.stop_ids) if i is not None]
    self._special.add_special_tokens([
        tokenizers.AddedToken(_piece(self._special, i), normalized=False)
        for i in named if i not in _special_ids(self._special)])
    self._plain = tokenizers.Tokenizer.from_str(self._special.to_str())
    # The library's name: special tokens in the text are encoded as text.
    self._plain.encode_special_tokens = True
    vocabulary = self._special.get_vocab(with_added_tokens=True)
    self.vocab_size = max(vocabulary.values()) + 1
    self.controls = {
        _piece(self._special, i): i for i in _special_ids(self._special)}
    unk = getattr(self._special.model, "unk_token", None)
    self.unk_id = None if unk is None else self._special.token_to_id(unk)
    # Decoders strip a leading space at the start of a sequence only, so
    # `token_text` decodes a token behind this one.
    self._probe = self.encode("a")
    self._probe_length = len(self.decode(self._probe))

  def encode(self, text: str, *, special: bool = False) -> list[int]:
    """Token ids; special tokens are parsed with `special` only."""
    tokenizer = self._special if special else self._plain
    return tokenizer.encode(text, add_special_tokens=False).ids

  def decode(
      self, ids: Sequence[int], *, skip_special: bool = False) -> str:
    """Text; bytes that are not UTF-8 become U+FFFD."""
    return self._special.decode(
        [int(i) for i in ids], skip_special_tokens=skip_special)

  def token_text(self, token: int) -> str:
    """The text of one token; its vocabulary entry if it is a part of one."""
    text = self.decode([*self._probe, int(token)])[self._probe_length:]
    if "\ufffd" in text:
      return _piece(self._special, int(token))
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
    bos = None if self.bos_id is None else _piece(self._special, self.bos_id)
    _write_json(directory / "tokenizer_config.json", {
        "bos_token": bos, "add_bos_token": bos is not None,
        "eos_token": _piece(self._special, self.eos_id),
        "chat_template": self.chat_template})
    _write_json(
        directory / "generation_config.json",
        {"eos_token_id": list(self.stop_ids)})


def load(path: str | pathlib.Path) -> Tokenizer:
  """Loads a `tokenizer.json`, a SentencePiece `*.model`, or a directory.

  `tokenizer_config.json` (BOS, EOS, chat template), `chat_template.jinja` and
  `generation_config.json` (all stop ids) are read from the same directory.

  Raises:
    ValueError: no tokenizer there, or its EOS is not named anywhere.
  """
  path = pathlib.Path(path).expanduser()
  if path.is_dir():
    names = ("tokenizer.json", "tokenizer.model", "spiece.model")
    found = [path / name for name in names if (path / name).exists()]
    if not found:
      raise ValueError(
          f"{path} has none of {', '.join(names)}. Point tokenizer.path at a "
          "tokenizer file or at a directory that has one.")
    path = found[0]
  if not path.exists():
    raise ValueError(f"{path} does not exist. Check tokenizer.path.")
  if path.suffix == ".model":
    config = _read_json(path.parent / "tokenizer_config.json")
    return SentencePieceTokenizer(
        path.read_bytes(), _chat_template(path.parent, config))
  if path.suffix == ".json":
    return _load_hugging_face(path)
  raise ValueError(
      f"{path} is neither a tokenizer.json nor a SentencePiece *.model. "
      "Check tokenizer.path.")


def newline_ends(tokenizer: Tokenizer) -> np.ndarray:
  """[vocab_size] bool: the token's text ends in a line break."""
  return np.array([
      tokenizer.token_text(i).endswith("\n")
      for i in range(tokenizer.vocab_size)], bool)


def _load_hugging_face(path: pathlib.Path) -> HuggingFaceTokenizer:
  tokenizer = tokenizers.Tokenizer.from_file(str(path))
  config = _read_json(path.parent / "tokenizer_config.json")
  generation = _read_json(path.parent / "generation_config.json")
  stops = generation.get("eos_token_id") or []
  stops = [stops] if isinstance(stops, int) else list(stops)
  eos = _named_id(tokenizer, config, "eos_token", path)
  if eos is None and not stops:
    raise ValueError(
        f"{path.parent} does not say which token ends a text: neither "
        "tokenizer_config.json (eos_token) nor generation_config.json "
        "(eos_token_id). Add one of them beside tokenizer.json.")
  return HuggingFaceTokenizer(
      tokenizer, bos_id=_begins_with(tokenizer, config, path),
      eos_id=stops[0] if eos is None else eos, stop_ids=stops,
      chat_template=_chat_template(path.parent, config))


def _begins_with(tokenizer, config, path) -> int | None:
  """BOS, if the family puts it in front; naming one is not using it.

  Qwen and SmolLM2 name a BOS (or a stand-in) and never prepend it.
  """
  if "add_bos_token" in config:
    return (_named_id(tokenizer, config, "bos_token", path)
            if config["add_bos_token"] else None)
  plain = tokenizer.encode("a", add_special_tokens=False).ids
  whole = tokenizer.encode("a", add_special_tokens=True).ids
  return whole[0] if whole[:1] != plain[:1] else None


def _named_id(tokenizer, config, key, path) -> int | None:
  token = config.get(key)
  if isinstance(token, dict):  # A serialised AddedToken.
    token = token["content"]
  if token is None:
    return None
  found = tokenizer.token_to_id(token)
  if found is None:
    raise ValueError(
        f"{key} {token!r} of {path.parent}/tokenizer_config.json is not in "
        f"the vocabulary of {path.name}.")
  return found


def _chat_template(directory: pathlib.Path, config: dict) -> str | None:
  file = directory / "chat_template.jinja"
  if file.exists():
    return file.read_text(encoding="utf-8")
  template = config.get("chat_template")
  if isinstance(template, list):  # Several, by name.
    named = {entry["name"]: entry["template"] for entry in template}
    if "default" not in named:
      raise ValueError(
          f"{directory}/tokenizer_config.json has chat templates "
          f"{', '.join(named)} and none called \"default\". Write the one to "
          "use to a file and set chat_template to its path.")
    return named["default"]
  return template


def _splitter(words: Iterable[str]):
  """A function that splits a text around `words` and keeps them."""
  longest_first = sorted(words, key=len, reverse=True)
  if not longest_first:
    return lambda text: [text]
  pattern = re.compile(f"({'|'.join(map(re.escape, longest_first))})")
  return lambda text: [part for part in pattern.split(text) if part]


def _special_ids(tokenizer: tokenizers.Tokenizer) -> list[int]:
  decoder = tokenizer.get_added_tokens_decoder()
  return [i for i, token in decoder.items() if token.special]


def _piece(tokenizer: tokenizers.Tokenizer, token: int) -> str:
  piece = tokenizer.id_to_token(token)
  if piece is None:
    raise ValueError(
        f"the vocabulary of {tokenizer.get_vocab_size()} tokens has no id "
        f"{token}.")
  return piece


def _read_json(path: pathlib.Path) -> dict:
  return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def _write_json(path: pathlib.Path, contents: dict) -> None:
  path.write_text(json.dumps(contents, indent=2) + "\n", encoding="utf-8")
