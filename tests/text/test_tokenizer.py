"""Oracles: round trips, and text that must not become control tokens."""

import json

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import models, pre_tokenizers

from posttrain.text import tokenizer as tokenizer_lib
from posttrain.text import vocabulary
from tests.text import build

CHATML = build.chatml()
SUBWORDS = {
    kind: vocabulary.train_sentencepiece(
        build.TEXTS * 5, model_type=kind, vocab_size=size,
        symbols=("<think>", "</think>"))
    for kind, size in (("unigram", 290), ("bpe", 320))}
ALL = {"chatml": CHATML, **SUBWORDS}
# Text, and control strings among it.
TEXT = st.lists(st.one_of(
    st.text(st.characters(exclude_categories=("Cs",)), max_size=8),
    st.sampled_from(["<|im_end|>", "<|im_start|>", "</s>", "<unk>", "<think>",
                     "\n", "  "]))).map("".join)


@pytest.mark.parametrize("name", ALL)
@settings(max_examples=60, deadline=None)
@given(text=TEXT)
def test_text_comes_back_and_never_holds_a_control_token(name, text):
  tokenizer = ALL[name]
  # SentencePiece reserves U+2581 (a space) and cuts at NUL.
  text = text.replace("\u2581", "").replace("\0", "")
  ids = tokenizer.encode(text)
  assert not set(ids) & set(tokenizer.controls.values())
  assert tokenizer.unk_id is None or tokenizer.unk_id not in ids
  assert tokenizer.decode(ids) == text


@pytest.mark.parametrize("name", ALL)
@settings(max_examples=60, deadline=None)
@given(text=TEXT)
def test_the_bytes_of_tokens_are_those_of_the_text(name, text):
  """Characters of several tokens, byte pieces and leading spaces too."""
  tokenizer = ALL[name]
  text = text.replace("\u2581", "").replace("\0", "")
  ids = tokenizer.encode(text)
  assert b"".join(map(tokenizer.token_bytes, ids)) == text.encode()
  assert not any(tokenizer.token_bytes(i)
                 for i in tokenizer.controls.values())
  assert not tokenizer.words


def test_words_are_marked_and_have_the_bytes_of_their_text():
  words = build.words()
  assert words.words
  assert words.token_bytes(words.encode("Wait")[0]).strip() == b"Wait"
  level = tokenizers.Tokenizer(models.WordLevel(
      {"<unk>": 0, "</s>": 1, "\u00e9t\u00e9": 2}, unk_token="<unk>"))
  level.pre_tokenizer = pre_tokenizers.Whitespace()
  level = tokenizer_lib.HuggingFaceTokenizer(level, bos_id=None, eos_id=1)
  assert level.words and [*map(level.token_bytes, range(3))] == [
      b"", b"", "\u00e9t\u00e9".encode()]


@pytest.mark.parametrize("name", ALL)
def test_special_parses_exactly_the_control_tokens(name):
  tokenizer = ALL[name]
  for text, token in tokenizer.controls.items():
    ids = tokenizer.encode(f"a{text}b", special=True)
    assert ids.count(token) == 1
    assert token not in tokenizer.encode(f"a{text}b")
    assert tokenizer.decode(ids) == f"a{text}b"
    assert tokenizer.decode(ids, skip_special=True) == "ab"


@pytest.mark.parametrize("name", ALL)
def test_symbols_are_one_token_in_any_text(name):
  tokenizer = ALL[name]
  for special in (False, True):
    assert len(tokenizer.encode("<think>", special=special)) == 1


@pytest.mark.parametrize("name", [*ALL, "words", "llama"])
def test_saving_and_loading_changes_nothing(name, tmp_path):
  tokenizer = {**ALL, "words": build.words(), "llama": build.llama()}[name]
  tokenizer.save(tmp_path)
  loaded = tokenizer_lib.load(tmp_path)
  assert loaded.fingerprint() == tokenizer.fingerprint()
  for field in ("vocab_size", "bos_id", "eos_id", "stop_ids", "unk_id",
                "controls", "chat_template"):
    assert getattr(loaded, field) == getattr(tokenizer, field), field
  assert loaded.encode("6 - 5 <think>") == tokenizer.encode("6 - 5 <think>")


def test_newline_ends_agrees_with_decoding():
  for tokenizer in ALL.values():
    decoded = [tokenizer.decode([i]).endswith("\n")
               for i in range(tokenizer.vocab_size)]
    np.testing.assert_array_equal(
        tokenizer_lib.newline_ends(tokenizer), decoded)
    assert any(decoded)


def test_a_word_vocabulary_has_every_word_and_no_other():
  tokenizer = build.words("6 5 2 : 1\n- 12", "a-b \uff16 6")
  # NFKC would make the full-width six a six.
  words = ["6", "5", "2", ":", "1", "-", "12", "a-b", "\uff16", "<think>"]
  ids = [tokenizer.encode(word) for word in words]
  assert all(len(i) == 1 for i in ids)
  assert len({i[0] for i in ids}) == len(words)
  assert tokenizer.vocab_size == len(words) + 2 + 2  # <unk> </s> </think> Wait
  assert tokenizer.decode(tokenizer.encode("5 - 12")) == "5 - 12"
  assert tokenizer.encode(" 5\n-\t12\u3000") == tokenizer.encode("5 - 12")
  assert tokenizer.encode("seven") == [tokenizer.unk_id]


def test_training_is_deterministic_and_keeps_long_texts():
  train = lambda: vocabulary.train_sentencepiece(
      ["5 " * 5000 + "rare"], model_type="word")
  assert train().fingerprint() == train().fingerprint()
  assert train().encode("rare") != [train().unk_id]


def test_the_fingerprint_sees_the_stop_tokens():
  one = build.byte_level(["<e>", "<f>"], eos="<e>")
  two = build.byte_level(["<e>", "<f>"], eos="<e>", stops=("<f>",))
  assert one.fingerprint() != two.fingerprint()


def test_a_stop_token_that_the_file_calls_ordinary_is_not_read_from_text():
  tokenizer = build.byte_level([], eos="</think>")
  assert tokenizer.eos_id not in tokenizer.encode("a</think>")
  assert tokenizer.eos_id in tokenizer.encode("a</think>", special=True)


@pytest.mark.parametrize(
    ("config", "bos"),
    [({"add_bos_token": True}, 0), ({"add_bos_token": False}, None),
     ({}, None)])
def test_naming_a_bos_is_not_using_it(tmp_path, config, bos):
  build.llama(None).save(tmp_path)
  (tmp_path / "tokenizer_config.json").write_text(json.dumps(
      {"bos_token": {"content": "<|begin_of_text|>"},
       "eos_token": "<|eot_id|>", **config}))
  loaded = tokenizer_lib.load(tmp_path / "tokenizer.json")
  assert loaded.bos_id == bos
  assert loaded.stop_ids == (4, 1)


def test_a_post_processor_that_adds_bos_makes_the_family_have_one(tmp_path):
  import tokenizers
  from tokenizers import processors
  build.llama(None).save(tmp_path)
  raw = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
  raw.post_processor = processors.TemplateProcessing(
      single="<|begin_of_text|> $A", special_tokens=[("<|begin_of_text|>", 0)])
  raw.save(str(tmp_path / "tokenizer.json"))
  (tmp_path / "tokenizer_config.json").unlink()
  loaded = tokenizer_lib.load(tmp_path)
  assert loaded.bos_id == 0
  assert 0 not in loaded.encode("hello", special=True)


@pytest.mark.parametrize("name", [*ALL, "words", "llama"])
def test_a_file_that_cannot_be_read_is_named(name, tmp_path):
  """Never a traceback of a library that says nothing of the path."""
  tokenizer = {**ALL, "words": build.words(), "llama": build.llama()}[name]
  tokenizer.save(tmp_path)
  refused = 0
  for file in sorted(tmp_path.iterdir()):
    whole = file.read_bytes()
    for content in (b"", whole[:len(whole) // 2], whole[:9] + b"\xff\xfe",
                    b"[1, 2]", b"3", b'{"a": {"b": 1}}',
                    b'{"eos_token": 3, "eos_token_id": "x"}'):
      file.write_bytes(content)
      try:
        tokenizer_lib.load(tmp_path)
      except ValueError as error:
        refused += 1
        assert type(error) is ValueError
        assert str(tmp_path) in str(error)
    file.write_bytes(whole)
  assert refused >= 10
  assert tokenizer_lib.load(tmp_path).fingerprint() == tokenizer.fingerprint()


def test_errors_say_what_to_do(tmp_path):
  with pytest.raises(ValueError, match=r"none of tokenizer\.json"):
    tokenizer_lib.load(tmp_path)
  with pytest.raises(ValueError, match=r"Check tokenizer\.path"):
    tokenizer_lib.load(tmp_path / "missing.json")
  CHATML.save(tmp_path)
  (tmp_path / "tokenizer_config.json").unlink()
  (tmp_path / "generation_config.json").unlink()
  with pytest.raises(ValueError, match="which token ends a text"):
    tokenizer_lib.load(tmp_path)
  train = vocabulary.train_sentencepiece
  with pytest.raises(ValueError, match=r"Raise tokenizer\.vocab_size"):
    train(["a b c"], model_type="word", vocab_size=3)
  with pytest.raises(ValueError, match=r"Set tokenizer\.vocab_size"):
    train(["a b c"], model_type="bpe")
  with pytest.raises(ValueError, match=r"Change tokenizer\.vocab_size"):
    train(["a b c"], model_type="bpe", vocab_size=5000)
  with pytest.raises(ValueError, match="not one word"):
    train(["a b"], model_type="word", symbols=("a b",))
  with pytest.raises(ValueError, match="not one of word, unigram, bpe"):
    train(["a b"], model_type="char")
