"""Trains small SentencePiece vocabularies, for tasks of our own.

The same texts and options give the same model, byte for byte.
"""

import io
import pathlib
import tempfile
from collections.abc import Iterable, Sequence

import sentencepiece
from sentencepiece import sentencepiece_model_pb2

from posttrain.text import tokenizer as tokenizer_lib

MODEL_TYPES = ("word", "unigram", "bpe")

# For word vocabularies: any white space is a space. SentencePiece's own rules
# that do this also fold Unicode (a full-width six becomes a six), and every
# distinct word is to get its own id.
WHITESPACE_RULE = "".join(
    f"{code:X}\t20\n" for code in range(0x3001)
    if chr(code).isspace() and chr(code) != " ")


def train_sentencepiece(
    texts: Iterable[str], *, model_type: str, vocab_size: int = 0,
    symbols: Sequence[str] = (),
) -> tokenizer_lib.SentencePieceTokenizer:
  """Trains a small vocabulary; the same texts give the same model.

  "word" splits at whitespace (runs of it become one space) and maps words
  that it has not seen to one unknown id: for procedural tasks. "unigram" and
  "bpe" keep every character, falling back to bytes. Id 0 is unknown, id 1 is
  EOS; there is no BOS.

  Args:
    texts: the training texts.
    model_type: "word", "unigram" or "bpe".
    vocab_size: the number of ids; 0, with "word" only, means all words.
    symbols: texts that always become a single token.

  Raises:
    ValueError: the size does not suit the texts, or a symbol the type.
  """
  if model_type not in MODEL_TYPES:
    raise ValueError(
        f"{model_type!r} is not one of {', '.join(MODEL_TYPES)}. Check "
        "tokenizer.model_type.")
  lines = list(texts)
  if model_type == "word":
    options, lines, vocab_size = _word_options(
        lines, vocab_size, symbols)
  else:
    if vocab_size == 0:
      raise ValueError(
          f"a {model_type} vocabulary needs a size. Set tokenizer.vocab_size.")
    options = dict(
        byte_fallback=True, normalization_rule_name="identity",
        remove_extra_whitespaces=False, add_dummy_prefix=False,
        split_digits=True,
        # A line break is a token of its own, so that "ends in a newline" is
        # a property of a token.
        user_defined_symbols=[*symbols, "\n"])
  with tempfile.TemporaryDirectory() as directory:
    if model_type == "word":
      rule = pathlib.Path(directory, "whitespace.tsv")
      rule.write_text(WHITESPACE_RULE)
      options["normalization_rule_tsv"] = str(rule)
    return tokenizer_lib.SentencePieceTokenizer(_train(
        lines, model_type=model_type, vocab_size=vocab_size, **options))


def _train(texts: list[str], **options) -> bytes:
  writer = io.BytesIO()
  try:
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts), model_writer=writer, unk_id=0,
        eos_id=1, bos_id=-1, pad_id=-1, num_threads=1, minloglevel=2,
        character_coverage=1.0,
        # The default drops longer sentences silently.
        max_sentence_length=1 << 24, **options)
  except RuntimeError as error:
    raise ValueError(
        f"SentencePiece cannot train a {options['model_type']} vocabulary of "
        f"{options['vocab_size']} ids on {len(texts)} texts: {error} Change "
        "tokenizer.vocab_size.") from error
  model = sentencepiece_model_pb2.ModelProto()  # type: ignore[attr-defined]
  model.ParseFromString(writer.getvalue())
  # A temporary path in the model would change its fingerprint.
  model.normalizer_spec.ClearField("normalization_rule_tsv")
  return model.SerializeToString(deterministic=True)


def _word_options(texts, vocab_size, symbols):
  """Chooses the options of a word vocabulary, and checks its size.

  A symbol is a word here; one more text makes sure that the trainer sees it.
  """
  spaced = [symbol for symbol in symbols if len(symbol.split()) != 1]
  if spaced:
    raise ValueError(
        f"{spaced[0]!r} is not one word, and a word vocabulary has only "
        "words. Change tokenizer.symbols or tokenizer.model_type.")
  texts = [" ".join(symbols), *texts] if symbols else texts
  words = {word for text in texts for word in text.split()}
  needed = len(words) + 2
  if vocab_size == 0:
    vocab_size = needed
  if vocab_size < needed:
    raise ValueError(
        f"the texts have {len(words)} distinct words, which with <unk> and "
        f"</s> need {needed} ids. Raise tokenizer.vocab_size, or set it to 0.")
  return dict(hard_vocab_limit=False), texts, vocab_size
