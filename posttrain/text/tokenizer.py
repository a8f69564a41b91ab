"""Tokenizers: SentencePiece and Hugging Face `tokenizer.json`, one interface.

Two kinds of text reach a tokenizer. A chat template's own text may name
control tokens (`<|im_end|>`), and `encode(text, special=True)` turns them into
their ids. Everything else (prompts, completions, message content) is encoded
with `special=False`, where the same characters are ordinary text: a user
cannot end a turn by typing its name. Symbols that are not control tokens
(`<think>` as a plain vocabulary entry) are recognised in both.

Some tokenizers put a space before a text at the start of a sequence, and not
within one. `after` is the token that the text follows, None at the start.

No BOS or EOS is added here; `posttrain.text.render` does that, once.
"""

import pathlib
import re
from collections.abc import Sequence
from typing import Protocol

import numpy as np
import tokenizers

from posttrain.text import (
    hugging_face_tokenizer,
    sentencepiece_tokenizer,
    token_files,
)
from posttrain.text.hugging_face_tokenizer import HuggingFaceTokenizer
from posttrain.text.sentencepiece_tokenizer import SentencePieceTokenizer


class Tokenizer(Protocol):
  """Interface of a tokenizer.

  Attributes:
    vocab_size: ids are in [0, vocab_size).
    bos_id: the id that every sequence begins with; None for families without
      one (Qwen, SmolLM2).
    eos_id: the id that ends a completion.
    stop_ids: EOS and the other ids at which sampling stops (end of turn).
    unk_id: the id for text that the vocabulary cannot spell, or None.
    words: each token is a word, and decoding puts the spaces between them: the
      bytes of a text are not those of its tokens.
    controls: control tokens, text -> id.
    named: texts that a chat template may write by name, "bos_token" and others.
      A family can name a BOS that its sequences do not begin with (OLMo 2).
    chat_template: Jinja source, or None.
  """

  vocab_size: int
  bos_id: int | None
  eos_id: int
  stop_ids: tuple[int, ...]
  unk_id: int | None
  words: bool
  controls: dict[str, int]
  named: dict[str, str]
  chat_template: str | None

  def encode(
      self, text: str, *, special: bool = False, after: int | None = None,
  ) -> list[int]: ...

  def decode(
      self, ids: Sequence[int], *, skip_special: bool = False) -> str: ...

  def token_text(self, token: int) -> str: ...

  def token_bytes(self, token: int) -> bytes: ...

  def fingerprint(self) -> str: ...

  def save(self, directory: str | pathlib.Path) -> None: ...


def load(
    path: str | pathlib.Path, *, vocab_size: int | None = None) -> Tokenizer:
  """Loads a `tokenizer.json`, a SentencePiece `*.model`, or a directory.

  `tokenizer_config.json` (BOS, EOS, added tokens, chat template),
  `chat_template.jinja` and `generation_config.json` (all stop ids) are read
  from the same directory.

  Args:
    path: the file or directory.
    vocab_size: the model's; added tokens of a `tokenizer.json` from this id on
      are left out. (Gemma 3's smallest models have no embedding for the token
      of images, which their tokenizer names.)

  Raises:
    ValueError: there is no tokenizer, or no file names its EOS.
  """
  path = pathlib.Path(path).expanduser()
  if path.is_dir():
    # The pipeline is preferred over the model that it was converted from, as in
    # transformers.
    names = ("tokenizer.json", "tokenizer.model", "spiece.model")
    found = [path / name for name in names if (path / name).exists()]
    if not found:
      raise ValueError(
          f"{path} has none of {', '.join(names)}. Point tokenizer.path at a "
          "tokenizer file or at a directory that has one.")
    path = found[0]
  if not path.exists():
    raise ValueError(f"{path} does not exist. Check tokenizer.path.")
  if path.suffix not in (".model", ".json"):
    raise ValueError(
        f"{path} is neither a tokenizer.json nor a SentencePiece *.model. "
        "Check tokenizer.path.")
  with token_files.errors_name(path.parent):
    return (_load_sentencepiece(path) if path.suffix == ".model"
            else _load_hugging_face(path, vocab_size))


def newline_ends(tokenizer: Tokenizer) -> np.ndarray:
  """Marks the tokens whose text ends in a line break: [vocab_size] bool."""
  return np.array([
      tokenizer.token_text(i).endswith("\n")
      for i in range(tokenizer.vocab_size)], bool)


def check_known(tokenizer: Tokenizer, text: str, name: str) -> None:
  """Raises ValueError if the vocabulary cannot spell a text; `name` names it.
  """
  if tokenizer.unk_id is not None and (
      tokenizer.unk_id in tokenizer.encode(text)):
    raise ValueError(
        f"{name} {text!r} has words that this vocabulary does not know. "
        "Change it, or use a model that can read it.")


def spellings(tokenizer: Tokenizer, words: Sequence[str]) -> np.ndarray:
  """Marks the tokens that spell one of the words: [vocab_size] bool.

  Case, and spaces and punctuation around a word, do not matter: " Wait," spells
  "wait", and "await" does not. (NoWait, https://arxiv.org/abs/2506.08343, takes
  every token that contains the word, and removes those like "await" by hand.)
  Control tokens are no words.

  Raises:
    ValueError: no token spells a word.
  """
  plain = lambda text: re.sub(r"^\W+|\W+$", "", text).casefold()
  controls = {*tokenizer.controls.values(), *tokenizer.stop_ids}
  # By each token's text rather than the vocabulary's entry, which has "Ġ" or
  # "▁" for a space.
  texts = [None if i in controls else plain(tokenizer.token_text(i))
           for i in range(tokenizer.vocab_size)]
  wanted = {plain(word): word for word in words}
  for text, word in wanted.items():
    if not text or text not in texts:
      raise ValueError(
          f"suppress: no token of this vocabulary is the word {word!r}, and "
          "only words of one token can be left out. Take it off the list.")
  return np.array([text in wanted for text in texts], bool)


def _load_sentencepiece(path: pathlib.Path) -> SentencePieceTokenizer:
  config = token_files.read(path.parent / "tokenizer_config.json")
  with token_files.errors_name(path):
    proto = sentencepiece_tokenizer.with_added(
        path.read_bytes(), token_files.added_tokens(config))
  return SentencePieceTokenizer(
      proto, chat_template=token_files.chat_template(path.parent, config),
      add_bos=config.get("add_bos_token", True),
      stop_ids=token_files.stop_ids(path.parent),
      named=token_files.named(config) or None,
      prefix_each=config.get("legacy", True))


def _load_hugging_face(
    path: pathlib.Path, vocab_size: int | None) -> HuggingFaceTokenizer:
  with token_files.errors_name(path):
    tokenizer = tokenizers.Tokenizer.from_file(str(path))
  if vocab_size is not None:
    tokenizer = hugging_face_tokenizer.without_added(tokenizer, vocab_size)
  config = token_files.read(path.parent / "tokenizer_config.json")
  if not config.get("legacy", True):
    tokenizer = hugging_face_tokenizer.prefix_at_start_only(tokenizer)
  stops = token_files.stop_ids(path.parent)
  named = token_files.named(config)
  eos = _named_id(tokenizer, named, "eos_token", path)
  if eos is None and not stops:
    raise ValueError(
        f"{path.parent} does not say which token ends a text: neither "
        "tokenizer_config.json (eos_token) nor generation_config.json "
        "(eos_token_id). Add one of them next to tokenizer.json.")
  return HuggingFaceTokenizer(
      tokenizer, bos_id=_begins_with(tokenizer, config, named, path),
      eos_id=stops[0] if eos is None else eos, stop_ids=stops, named=named,
      chat_template=token_files.chat_template(path.parent, config))


def _begins_with(tokenizer, config, named, path) -> int | None:
  """Returns BOS if the family puts it in front; naming one is not using it.

  Qwen and SmolLM2 name a BOS (or a stand-in) and never prepend it.
  """
  if "add_bos_token" in config:
    return (_named_id(tokenizer, named, "bos_token", path)
            if config["add_bos_token"] else None)
  # Without the key the pipeline's post-processor tells: it adds BOS or not.
  plain = tokenizer.encode("a", add_special_tokens=False).ids
  whole = tokenizer.encode("a", add_special_tokens=True).ids
  return whole[0] if whole[:1] != plain[:1] else None


def _named_id(tokenizer, named, key, path) -> int | None:
  if key not in named:
    return None
  found = tokenizer.token_to_id(named[key])
  if found is None:
    raise ValueError(
        f"{key} {named[key]!r} of {path.parent}/tokenizer_config.json is not "
        f"in the vocabulary of {path.name}.")
  return found
