"""A GGUF file's tokenizer, as a pipeline of the `tokenizers` library.

The file holds a vocabulary, merges in order of rank and the names of a model
("gpt2": byte-level BPE) and of a pre-tokenizer, but not the pre-tokenizer
itself: that is an expression in llama.cpp's source, rebuilt here by name.
"smollm" first takes every numeric character alone, then splits what is left
as GPT-2 does. Without the first step "a  5" or a number after an empty line
gives other ids than the model was trained on.

A byte without a token is left out by llama.cpp, by Hugging Face's pipeline of
the same model, and here. SmolLM2 has none for six ASCII control characters
(0x04, 06, 13, 14, 16, 1d) and for what only unassigned code points need.

Source: llama.cpp, `src/llama-vocab.cpp`, LLAMA_VOCAB_PRE_TYPE_SMOLLM.
"""

import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from posttrain.interop.gguf import GGUFFile
from posttrain.text.tokenizer import HuggingFaceTokenizer

# llama.cpp's token types that this reader knows.
NORMAL, CONTROL = 1, 3

# Control tokens that end an answer whatever the metadata name: llama.cpp
# finds its end-of-generation tokens by such a list of texts, too.
END_TEXTS = ("<|im_end|>", "<|endoftext|>")


def pre_tokenizer(name: str) -> pre_tokenizers.PreTokenizer:
  """The splitter that llama.cpp uses for `tokenizer.ggml.pre`."""
  if name != "smollm":
    raise ValueError(
        f"tokenizer.ggml.pre is {name!r}; this reader knows 'smollm' only, and "
        "a wrong splitter gives wrong ids without any other sign.")
  return pre_tokenizers.Sequence([
      pre_tokenizers.Digits(individual_digits=True),
      pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)])


def build(file: GGUFFile) -> tokenizers.Tokenizer:
  """The pipeline; encodes without BOS or EOS.

  Raises:
    ValueError: metadata that is missing, or a tokenizer of another kind.
  """
  needed = [f"tokenizer.ggml.{name}"
            for name in ("model", "pre", "tokens", "token_type", "merges")]
  missing = [key for key in needed if key not in file.metadata]
  if missing:
    raise ValueError(f"{file.path} lacks {', '.join(missing)}.")
  kind, pre, tokens, types, merges = (file.metadata[key] for key in needed)
  if kind != "gpt2":
    raise ValueError(
        f"{file.path} has a tokenizer of the kind {kind!r}; this reader knows "
        "'gpt2' (byte-level BPE) only.")
  unknown = sorted(set(types) - {NORMAL, CONTROL})
  if unknown:
    raise ValueError(
        f"{file.path} has tokens of the types {unknown}; this reader knows "
        f"{NORMAL} (normal) and {CONTROL} (control).")
  pairs = [tuple(merge.split(" ", 1)) for merge in merges]
  vocab = {token: index for index, token in enumerate(tokens)}
  tokenizer = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=pairs))
  tokenizer.pre_tokenizer = pre_tokenizer(pre)
  tokenizer.decoder = decoders.ByteLevel()
  tokenizer.add_special_tokens([
      tokenizers.AddedToken(token, special=True, normalized=False)
      for token, kind in zip(tokens, types, strict=True) if kind == CONTROL])
  return tokenizer


def stop_ids(file: GGUFFile) -> tuple[int, ...]:
  """EOS first, then the other ids that end an answer."""
  names = ("eos_token_id", "eot_token_id", "eom_token_id")
  keys = [f"tokenizer.ggml.{name}" for name in names]
  if keys[0] not in file.metadata:
    raise ValueError(f"{file.path} lacks {keys[0]}.")
  tokens = file.metadata["tokenizer.ggml.tokens"]
  types = file.metadata["tokenizer.ggml.token_type"]
  named = [file.metadata[key] for key in keys if key in file.metadata]
  listed = [
      tokens.index(text) for text in END_TEXTS
      if text in tokens and types[tokens.index(text)] == CONTROL]
  return tuple(dict.fromkeys(named + listed))


def bos_id(file: GGUFFile) -> int | None:
  """The id that starts every sequence; None where the family has none.

  Files name a BOS token even when the model was trained without one
  (SmolLM2's is "<|im_start|>"); `add_bos_token` says whether it is used, and
  llama.cpp takes "no" where a byte-level file leaves it out.
  """
  if not file.metadata.get("tokenizer.ggml.add_bos_token", False):
    return None
  return file.metadata["tokenizer.ggml.bos_token_id"]


def load(file: GGUFFile) -> HuggingFaceTokenizer:
  """The tokenizer with its special ids and its chat template.

  Raises:
    ValueError: see `build`, or the file does not say what ends an answer.
  """
  eos_id, *others = stop_ids(file)
  return HuggingFaceTokenizer(
      build(file), bos_id=bos_id(file), eos_id=eos_id, stop_ids=others,
      chat_template=file.metadata.get("tokenizer.chat_template"))
