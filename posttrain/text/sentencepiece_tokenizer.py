"""SentencePiece tokenizer: a `.model` file as a `Tokenizer`.

A release can name tokens that its `.model` lacks, or declare a piece of the
model to be a control token (Gemma's "<start_of_turn>" is a plain symbol in the
model and special in `tokenizer_config.json`). Both are written into the model
when it is loaded. SentencePiece then finds symbols in any text and control
pieces in none, and one file holds the whole tokenizer.
"""

import hashlib
import json
import pathlib
from collections.abc import Mapping, Sequence

import sentencepiece
from sentencepiece import sentencepiece_model_pb2

from posttrain.text import token_files

_Piece = sentencepiece_model_pb2.ModelProto.SentencePiece  # type: ignore[attr-defined]


class SentencePieceTokenizer:
  """Wraps a SentencePiece model. See `Tokenizer` for the attributes."""

  def __init__(
      self, proto: bytes, *, chat_template: str | None = None,
      add_bos: bool = True, stop_ids: Sequence[int] = (),
      named: Mapping[str, str] | None = None, prefix_each: bool = True,
  ):
    """Wraps a serialised model.

    Args:
      proto: the model file.
      chat_template: Jinja source.
      add_bos: every sequence begins with the model's BOS, if it has one.
      stop_ids: in addition to the model's EOS; they become control tokens.
      named: `Tokenizer.named`; None: the model's BOS and EOS.
      prefix_each: if the model puts a space before a text, it also puts one
        after every control token ("legacy" in transformers).

    Raises:
      ValueError: the model has no EOS piece.
    """
    proto = _as_controls(proto, stop_ids)
    self._proto = proto
    self._model = sentencepiece.SentencePieceProcessor(model_proto=proto)
    # Two processors, as the space before a text is a property of the model.
    self._bare = sentencepiece.SentencePieceProcessor(
        model_proto=_without_prefix(proto))
    self._prefix_each = prefix_each
    self.vocab_size = len(self._model)
    self.eos_id = self._model.eos_id()
    if self.eos_id < 0:
      raise ValueError(
          "the SentencePiece model has no EOS piece (eos_id=-1), and a "
          "completion needs one to end. Train it with an EOS id.")
    bos = self._model.bos_id()
    self.bos_id: int | None = bos if bos >= 0 and add_bos else None
    self.unk_id: int | None = self._model.unk_id()
    trainer = _parse(proto).trainer_spec
    self.words = trainer.model_type == trainer.WORD
    self.stop_ids = tuple(dict.fromkeys((self.eos_id, *stop_ids)))
    self.chat_template = chat_template
    piece = self._model.id_to_piece
    own = {"eos_token": piece(self.eos_id)}
    self.named = dict(
        (own | ({"bos_token": piece(bos)} if bos >= 0 else {}))
        if named is None else named)
    self.controls = {
        piece(i): i for i in range(self.vocab_size)
        if self._model.is_control(i)}
    self._split = token_files.splitter(self.controls)

  def encode(
      self, text: str, *, special: bool = False, after: int | None = None,
  ) -> list[int]:
    """Encodes a text; control pieces in it are parsed with `special` only."""
    ids: list[int] = []
    for part in self._split(text) if special else [text]:
      control = self.controls.get(part) if special else None
      if control is None:
        ids += self._model_after(after).encode(part)
      else:
        ids.append(control)
      after = ids[-1] if ids else after
    return ids

  def decode(
      self, ids: Sequence[int], *, skip_special: bool = False) -> str:
    """Decodes to text; SentencePiece itself would drop control pieces silently.
    """
    parts: list[str] = []
    run: list[int] = []
    before = None  # The control token before the run.
    for token in map(int, ids):
      if not self._model.is_control(token):
        run.append(token)
        continue
      parts.append(self._model_after(before).decode(run))
      run, before = [], token
      if not skip_special:
        parts.append(self._model.id_to_piece(token))
    parts.append(self._model_after(before).decode(run))
    return "".join(parts)

  def _model_after(self, token: int | None):
    """Chooses the model, or the one that puts no space before a text."""
    starts = token is None or (
        self._prefix_each and self._model.is_control(token))
    return self._model if starts else self._bare

  def token_text(self, token: int) -> str:
    """Returns the text of one token, its leading space included."""
    piece = self._model.id_to_piece(int(token))
    if self._model.is_byte(int(token)):
      value = int(piece[3:-1], 16)  # "<0x0A>"
      return chr(value) if value < 128 else piece
    return piece.replace("\u2581", " ")

  def token_bytes(self, token: int) -> bytes:
    """Returns the bytes that a token adds to a text, a leading space too.

    Control, unknown and unused pieces have none.
    """
    model, token = self._model, int(token)
    if (model.is_control(token) or model.is_unknown(token)
        or model.is_unused(token)):
      return b""
    piece = model.id_to_piece(token)
    if model.is_byte(token):
      return bytes([int(piece[3:-1], 16)])  # "<0x0A>"
    return piece.replace("\u2581", " ").encode()

  def fingerprint(self) -> str:
    """Computes the sha256 of the model and of the settings around it."""
    contents = json.dumps([
        hashlib.sha256(self._proto).hexdigest(), self.bos_id, self.stop_ids,
        self._prefix_each])
    return hashlib.sha256(contents.encode()).hexdigest()

  def save(self, directory: str | pathlib.Path) -> None:
    """Writes the files that `load(directory)` reads, under their usual names.
    """
    directory = pathlib.Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "tokenizer.model").write_bytes(self._proto)
    # With this class transformers makes its pipeline from the model, rather
    # than from its knowledge of a family. (The type "word" it cannot read.)
    token_files.write(
        directory, self, legacy=self._prefix_each,
        tokenizer_class="PreTrainedTokenizerFast")


def with_added(proto: bytes, added: Mapping[int, tuple[str, bool]]) -> bytes:
  """Adds tokens to a model that are named in other files of its release.

  Args:
    proto: the model file.
    added: id -> (text, it is a control token), as `added_tokens_decoder`.

  Raises:
    ValueError: the model has another piece at that id.
  """
  model = _parse(proto)
  size = len(model.pieces)
  for token, (text, control) in sorted(added.items()):
    while len(model.pieces) < token:  # Fill ids that no file names.
      model.pieces.add(
          piece=f"[UNUSED_{len(model.pieces)}]", score=0.0, type=_Piece.UNUSED)
    kind = _Piece.CONTROL if control else _Piece.USER_DEFINED
    if token >= size:
      model.pieces.add(piece=text, score=0.0, type=kind)
      continue
    piece = model.pieces[token]
    if piece.piece != text:
      raise ValueError(
          f"token {token} is {text!r} in tokenizer_config.json and "
          f"{piece.piece!r} in the SentencePiece model.")
    # The unknown piece must stay what it is, as a model needs exactly one.
    if piece.type != _Piece.UNKNOWN:
      piece.type = kind
  return model.SerializeToString(deterministic=True)


def bpe_model(
    pieces: Sequence[str], scores: Sequence[float], types: Sequence[int], *,
    named: Mapping[str, str], dummy_prefix: bool,
    remove_extra_whitespaces: bool,
) -> bytes:
  """Makes a BPE model from a vocabulary, such as that of a GGUF file.

  Args:
    pieces, scores, types: [V], by id; types are SentencePiece's numbers.
    named: `Tokenizer.named`.
    dummy_prefix: put a space before a text.
    remove_extra_whitespaces: make runs of spaces one space.

  Raises:
    RuntimeError: SentencePiece does not accept the vocabulary.
  """
  model = sentencepiece_model_pb2.ModelProto()  # type: ignore[attr-defined]
  for piece, score, kind in zip(pieces, scores, types, strict=True):
    model.pieces.add(piece=piece, score=score, type=kind)
  trainer = model.trainer_spec
  trainer.model_type = trainer.BPE
  trainer.byte_fallback = _Piece.BYTE in types
  trainer.vocab_size = len(pieces)
  for name, text in named.items():  # "bos_token" -> trainer.bos_piece
    setattr(trainer, name.replace("_token", "_piece"), text)
  normalizer = model.normalizer_spec
  normalizer.name = "identity"
  normalizer.add_dummy_prefix = dummy_prefix
  normalizer.remove_extra_whitespaces = remove_extra_whitespaces
  normalizer.escape_whitespaces = True
  proto = model.SerializeToString(deterministic=True)
  sentencepiece.SentencePieceProcessor(model_proto=proto)  # Raises if invalid.
  return proto


def _as_controls(proto: bytes, ids: Sequence[int]) -> bytes:
  """Makes stop tokens control pieces: a user must not end a turn by typing one.
  """
  model = _parse(proto)
  symbols = [i for i in ids if model.pieces[i].type != _Piece.CONTROL]
  for token in symbols:
    model.pieces[token].type = _Piece.CONTROL
  return model.SerializeToString(deterministic=True) if symbols else proto


def _without_prefix(proto: bytes) -> bytes:
  """Copies a model so that it puts no space before a text.

  Word vocabularies are left alone: each of their pieces begins with a space.
  """
  model = _parse(proto)
  trainer = model.trainer_spec
  if trainer.model_type != trainer.WORD:
    model.normalizer_spec.add_dummy_prefix = False
  return model.SerializeToString(deterministic=True)


def _parse(proto: bytes):
  model = sentencepiece_model_pb2.ModelProto()  # type: ignore[attr-defined]
  model.ParseFromString(proto)
  return model
