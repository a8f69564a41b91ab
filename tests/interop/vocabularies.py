"""The families' small tokenizers as GGUF metadata, as llama.cpp writes it."""

import json

import gguf
import sentencepiece
from sentencepiece import sentencepiece_model_pb2

from tests.text import families

NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5


def write_byte_level(path, name: str, pre: str) -> None:
  """A file without tensors: the kind "gpt2"."""
  spec = json.loads(families.pipeline_of(name))
  vocab = dict(spec["model"]["vocab"])
  types = dict.fromkeys(vocab.values(), NORMAL)
  for token in spec["added_tokens"]:
    vocab[token["content"]] = token["id"]
    types[token["id"]] = CONTROL if token["special"] else USER_DEFINED
  tokens = sorted(vocab, key=vocab.get)
  # Embedding tables are longer than vocabularies; the converter fills up.
  tokens += ["[PAD0]", "[PAD1]"]
  writer = gguf.GGUFWriter(path, "llama")
  writer.add_tokenizer_model("gpt2")
  writer.add_tokenizer_pre(pre)
  writer.add_token_list(tokens)
  writer.add_token_types(
      [types.get(vocab.get(token), UNUSED) for token in tokens])
  writer.add_token_merges(
      [pair if isinstance(pair, str) else " ".join(pair)
       for pair in spec["model"]["merges"]])
  family = families.FAMILIES[name]
  finish(writer, name, vocab[family.eos], vocab.get(family.bos))


def write_sentencepiece(path, model_path, name: str, prefix: bool) -> None:
  """A file without tensors: the kind "llama"."""
  proto = sentencepiece_model_pb2.ModelProto()
  proto.ParseFromString(model_path.read_bytes())
  model = sentencepiece.SentencePieceProcessor(model_file=str(model_path))
  family = families.FAMILIES[name]
  special = set(family.special) - {"<unk>"}
  writer = gguf.GGUFWriter(path, "llama")
  writer.add_tokenizer_model("llama")
  writer.add_tokenizer_pre("default")
  kinds = [
      CONTROL if piece.piece in special else piece.type
      for piece in proto.pieces]
  if name == "gemma3":  # As its files are.
    kinds[model.unk_id()] = CONTROL
  writer.add_token_list([
      piece.piece.replace("\u2581", " " if kind == USER_DEFINED else "\u2581")
      for piece, kind in zip(proto.pieces, kinds, strict=True)])
  writer.add_token_scores([piece.score for piece in proto.pieces])
  writer.add_token_types(kinds)
  writer.add_unk_token_id(model.unk_id())
  if not prefix:
    writer.add_add_space_prefix(False)
  finish(writer, name, model.piece_to_id(family.eos),
         model.piece_to_id(family.bos))


def finish(writer, name: str, eos: int, bos: int | None) -> None:
  writer.add_eos_token_id(eos)
  if bos is not None:
    writer.add_bos_token_id(bos)
  writer.add_chat_template(families.template(name))
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()
