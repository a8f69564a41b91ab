"""GGUF tokenizer: built from the vocabulary in a file's metadata.

`tokenizer.ggml.model` names one of two kinds.

"gpt2" is byte-level BPE: a vocabulary and merges in order of rank, and the name
of a pre-tokenizer, but not the pre-tokenizer itself. That is an expression in
llama.cpp's source, rebuilt here by name as the published pipelines have it. A
wrong one gives other ids than the model was trained on, without any other
sign, so an unknown name is an error.

"llama" is SentencePiece's BPE: pieces, scores and types, from which a
SentencePiece model is built.

A byte without a token is dropped by llama.cpp, by Hugging Face's pipeline of
the same model, and here. SmolLM2 has none for six ASCII control characters
(0x04, 06, 13, 14, 16, 1d) and for bytes of unassigned code points only.

Source: llama.cpp, `src/llama-vocab.cpp`. This module differs in one thing:
Qwen's pipeline composes characters (NFC) before it splits, llama.cpp does not.
"""

from collections.abc import Mapping
from typing import Any

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers

from posttrain.interop.gguf import GGUFFile
from posttrain.text import sentencepiece_tokenizer
from posttrain.text.hugging_face_tokenizer import HuggingFaceTokenizer
from posttrain.text.sentencepiece_tokenizer import SentencePieceTokenizer
from posttrain.text.tokenizer import Tokenizer

# llama.cpp's token types; SentencePiece's have the same numbers.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)

# Tokens that end an answer, even if the metadata do not name them: llama.cpp
# finds its end-of-generation tokens by such a list of texts, too.
END_TEXTS = ("<|im_end|>", "<|endoftext|>", "<|eot_id|>", "<|eom_id|>",
             "<|end_of_text|>", "<end_of_turn>")

# The expressions of the published tokenizer.json files.
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
QWEN2 = LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")  # Digits one by one.

# Pre-tokenizers by `tokenizer.ggml.pre`: an expression, or "digits" (each
# numeric character alone, then GPT-2's splitter), or "gpt2" (GPT-2's alone).
SPLITTERS = {
    "smollm": "digits", "gpt-2": "gpt2", "olmo": "gpt2", "qwen2": QWEN2,
    "llama-bpe": LLAMA3, "llama3": LLAMA3, "llama-v3": LLAMA3, "dbrx": LLAMA3,
    "smaug-bpe": LLAMA3}  # SmolLM3's files have this name.
# Llama 3 does not split a word that is in its vocabulary (`ignore_merges`), and
# begins a text with BOS.
LLAMA3_NAMES = ("llama-bpe", "llama3", "llama-v3")

NAMED = {"bos_token": "bos_token_id", "eos_token": "eos_token_id",
         "unk_token": "unknown_token_id", "pad_token": "padding_token_id"}


def load(file: GGUFFile) -> Tokenizer:
  """Builds the tokenizer, with its special ids and its chat template.

  Raises:
    ValueError: metadata are missing, the tokenizer is of another kind, or no
      token ends an answer.
  """
  stops = stop_ids(file)
  template = file.metadata.get("tokenizer.chat_template")
  named = named_tokens(file)
  if _kind(file) == "llama":
    return SentencePieceTokenizer(
        build_sentencepiece(file), add_bos=bos_id(file) is not None,
        stop_ids=stops, chat_template=template, named=named)
  return HuggingFaceTokenizer(
      build(file), bos_id=bos_id(file), eos_id=stops[0], stop_ids=stops,
      chat_template=template, named=named)


def _get(file: GGUFFile, *names: str) -> list[Any]:
  keys = [f"tokenizer.ggml.{name}" for name in names]
  missing = [key for key in keys if key not in file.metadata]
  if missing:
    raise ValueError(f"{file.path} lacks {', '.join(missing)}.")
  return [file.metadata[key] for key in keys]


def _kind(file: GGUFFile) -> str:
  kind, = _get(file, "model")
  if kind not in ("gpt2", "llama"):
    raise ValueError(
        f"{file.path} has a tokenizer of the kind {kind!r}; this reader knows "
        "'gpt2' (byte-level BPE) and 'llama' (SentencePiece BPE).")
  return kind


def _vocabulary(file: GGUFFile) -> tuple[list[str], list[int]]:
  """Reads texts and types of the tokens, by id."""
  tokens, types = _get(file, "tokens", "token_type")
  known = {NORMAL, CONTROL, USER_DEFINED, UNUSED}
  if _kind(file) == "llama":
    known |= {UNKNOWN, BYTE}
  unknown = sorted(set(types) - known)
  if unknown or len(types) != len(tokens):
    raise ValueError(
        f"{file.path} has {len(tokens)} tokens and {len(types)} token types, "
        f"{unknown} among them; this reader needs one for each token, of "
        f"{sorted(known)} in a tokenizer of this kind.")
  return tokens, types


def splitter(name: str) -> pre_tokenizers.PreTokenizer:
  """Makes the pre-tokenizer that `tokenizer.ggml.pre` names."""
  if name not in SPLITTERS:
    raise ValueError(
        f"tokenizer.ggml.pre is {name!r}; this reader knows "
        f"{', '.join(SPLITTERS)}, and a wrong splitter gives wrong ids "
        "without any other sign.")
  rule = SPLITTERS[name]
  level = pre_tokenizers.ByteLevel(
      add_prefix_space=False, use_regex=rule in ("digits", "gpt2"))
  if rule == "gpt2":
    return level
  first = (pre_tokenizers.Digits(individual_digits=True) if rule == "digits"
           else pre_tokenizers.Split(tokenizers.Regex(rule), "isolated"))
  return pre_tokenizers.Sequence([first, level])


def build(file: GGUFFile) -> tokenizers.Tokenizer:
  """Builds the pipeline of a "gpt2" file; it adds no BOS or EOS.

  Raises:
    ValueError: metadata are missing or unknown.
  """
  tokens, types = _vocabulary(file)
  pre, merges = _get(file, "pre", "merges")
  tokenizer = tokenizers.Tokenizer(models.BPE(
      vocab={token: index for index, token in enumerate(tokens)},
      merges=[tuple(merge.split(" ", 1)) for merge in merges],
      ignore_merges=pre in LLAMA3_NAMES))
  tokenizer.pre_tokenizer = splitter(pre)
  tokenizer.decoder = decoders.ByteLevel()
  if pre == "qwen2":
    tokenizer.normalizer = normalizers.NFC()
  added = lambda kind: [
      tokenizers.AddedToken(
          token, special=kind == CONTROL, normalized=False)
      for token, own in zip(tokens, types, strict=True) if own == kind]
  tokenizer.add_special_tokens(added(CONTROL))
  tokenizer.add_tokens(added(USER_DEFINED))
  return tokenizer


def build_sentencepiece(file: GGUFFile) -> bytes:
  """Builds the SentencePiece model of a "llama" file, serialised.

  Raises:
    ValueError: metadata are missing, or do not make a model.
  """
  tokens, types = _vocabulary(file)
  scores, = _get(file, "scores")
  unknown = file.metadata.get("tokenizer.ggml.unknown_token_id")
  if UNKNOWN not in types and unknown is not None:
    # The converter makes Gemma's <unk> a control token, and SentencePiece needs
    # an unknown one.
    types = [UNKNOWN if i == unknown else kind for i, kind in enumerate(types)]
  # The converter also writes the spaces of symbols as spaces, where
  # SentencePiece has its own character.
  tokens = [
      token.replace(" ", "\u2581") if kind == USER_DEFINED else token
      for token, kind in zip(tokens, types, strict=True)]
  flag = lambda name, default: bool(file.metadata.get(
      f"tokenizer.ggml.{name}", default))
  try:
    return sentencepiece_tokenizer.bpe_model(
        tokens, scores, types, named=named_tokens(file),
        dummy_prefix=flag("add_space_prefix", True),
        remove_extra_whitespaces=flag("remove_extra_whitespaces", False))
  except RuntimeError as error:
    raise ValueError(
        f"{file.path} holds no vocabulary that SentencePiece can use: "
        f"{error}") from error


def stop_ids(file: GGUFFile) -> tuple[int, ...]:
  """Lists the ids that end an answer, EOS first."""
  tokens, types = _vocabulary(file)
  eos_id, = _get(file, "eos_token_id")
  ids = {token: index for index, token in enumerate(tokens)}
  named = [
      file.metadata[key]
      for key in ("tokenizer.ggml.eot_token_id", "tokenizer.ggml.eom_token_id")
      if key in file.metadata]
  listed = [
      ids[text] for text in END_TEXTS
      if text in ids and types[ids[text]] in (CONTROL, USER_DEFINED)]
  return tuple(dict.fromkeys([eos_id, *named, *listed]))


def named_tokens(file: GGUFFile) -> Mapping[str, str]:
  """Returns `Tokenizer.named`: the texts of BOS, EOS and others."""
  tokens, = _get(file, "tokens")
  found = {name: file.metadata.get(f"tokenizer.ggml.{key}")
           for name, key in NAMED.items()}
  return {name: tokens[i] for name, i in found.items() if i is not None}


def bos_id(file: GGUFFile) -> int | None:
  """Returns the id that starts every sequence; None for families without one.

  Files name a BOS token even if the model was trained without one (SmolLM2's is
  "<|im_start|>"). `add_bos_token` says if it is used; without this key,
  llama.cpp uses it for SentencePiece and Llama 3.
  """
  default = (_kind(file) == "llama" or
             file.metadata.get("tokenizer.ggml.pre") in LLAMA3_NAMES)
  if not file.metadata.get("tokenizer.ggml.add_bos_token", default):
    return None
  return _get(file, "bos_token_id")[0]
