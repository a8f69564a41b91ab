"""Small tokenizers and chat templates that several tests share."""

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from posttrain.text import delimiters, symbols, thinking, vocabulary
from posttrain.text import tokenizer as tokenizer_lib

CHATML = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' "
    "+ message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")

# SmolLM2's own: a system turn appears by itself.
SMOLLM2 = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != "
    "'system' %}{{ '<|im_start|>system\nYou are a helpful AI assistant named "
    "SmolLM, trained by Hugging Face<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + "
    "'<|im_end|>' + '\n'}}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|im_start|>assistant\n' }}{% endif %}")

# Like Llama 3's: BOS in the template, trimmed contents, no line break behind
# the end of a turn.
LLAMA3 = (
    "{% for message in messages %}"
    "{% set content = '<|start_header_id|>' + message['role'] + "
    "'<|end_header_id|>\n\n' + message['content'] | trim + '<|eot_id|>' %}"
    "{% if loop.index0 == 0 %}{% set content = bos_token + content %}"
    "{% endif %}{{ content }}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}")

# Like Mistral's: no generation prompt, because [/INST] is one.
INST = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Roles must alternate') }}{% endif %}"
    "{% if message['role'] == 'user' %}"
    "{{ '[INST] ' + message['content'] + ' [/INST]' }}{% else %}"
    "{{ ' ' + message['content'] + eos_token }}{% endif %}{% endfor %}")

# Like Qwen 3's: reasoning stays in the last turn only.
STRIPS_REASONING = (
    "{% for message in messages %}{% set content = message['content'] %}"
    "{% if message['role'] == 'assistant' and not loop.last %}"
    "{% set content = content.split('</think>')[-1].lstrip('\n') %}"
    "{% endif %}{{'<|im_start|>' + message['role'] + '\n' + content + "
    "'<|im_end|>\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")

TEXTS = [
    "user assistant system hello world how are you",
    "The answer is 42. 1 + 2 = 3, and so on.",
    "a line\nanother line\n\n",
]


def byte_level(
    special: list[str], *, bos: str | None = None, eos: str,
    stops: tuple[str, ...] = (), chat_template: str | None = None,
) -> tokenizer_lib.HuggingFaceTokenizer:
  """A byte-level BPE in the manner of GPT-2, with <think> as a plain entry."""
  raw = tokenizers.Tokenizer(models.BPE())
  raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  raw.decoder = decoders.ByteLevel()
  raw.train_from_iterator(TEXTS * 4, trainers.BpeTrainer(
      vocab_size=330, special_tokens=special, show_progress=False,
      initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
  raw.add_tokens([
      tokenizers.AddedToken(text, special=False, normalized=False)
      for text in ("<think>", "</think>")])
  token = raw.token_to_id
  return tokenizer_lib.HuggingFaceTokenizer(
      raw, bos_id=None if bos is None else token(bos), eos_id=token(eos),
      stop_ids=[token(stop) for stop in stops], chat_template=chat_template)


def chatml(chat_template: str | None = CHATML):
  return byte_level(
      ["<|endoftext|>", "<|im_start|>", "<|im_end|>"], eos="<|im_end|>",
      stops=("<|endoftext|>",), chat_template=chat_template)


def llama(chat_template: str | None = LLAMA3):
  return byte_level(
      ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>",
       "<|end_header_id|>", "<|eot_id|>"],
      bos="<|begin_of_text|>", eos="<|eot_id|>", stops=("<|end_of_text|>",),
      chat_template=chat_template)


def inst():
  return byte_level(
      ["<s>", "</s>"], bos="<s>", eos="</s>", chat_template=INST)


def alone(size: int = 100, **strings) -> thinking.ThinkingIds:
  """Makes thinking strings of ids that merge with nothing."""
  ids = {"start": (), "end": (), "step": ()} | strings
  symbol = lambda ids: tuple(symbols.CONTROL + i for i in ids)
  further = ids.pop("delimiters", ())
  parsed = delimiters.Strings(
      symbol(ids["start"]), symbol(ids["end"]), tuple(dict.fromkeys(
          map(symbol, (ids["end"], *further)))), symbol(ids.pop("step")))
  return thinking.ThinkingIds(
      **ids, strings=parsed, tokens=[symbol([i]) for i in range(size)])


def words(*texts: str, symbols=("<think>", "</think>", "Wait")):
  return vocabulary.train_sentencepiece(
      texts or ("6 5 2 : 1 - + = OK NO",), model_type="word",
      symbols=symbols)

# Qwen's: punctuation goes with the line breaks behind it and a space before.
SPLITTER = (
    r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+")
# Merges across the edges of "</think>"; Ċ and Ġ are a line break and a space.
ACROSS = (".</", "Ġ</", "></", ">Ċ", ">ĊĊ")


def merging(
    texts: tuple[str, ...] = (
        "so it is.</think>\nThe answer", "it is </think>\n\n18", "<think>\n",
        "<b></think>\n", "Wait.</think> and 7", "a <think>x</think>y"),
    *, vocab_size: int = 330, chat_template: str | None = None,
) -> tokenizer_lib.HuggingFaceTokenizer:
  """Trains a byte-level BPE that merges across delimiters, as Qwen's does.

  "<think>" and "</think>" are no tokens of it. "<|im_end|>" ends a text.
  """
  raw = tokenizers.Tokenizer(models.BPE())
  raw.pre_tokenizer = pre_tokenizers.Sequence([
      pre_tokenizers.Split(tokenizers.Regex(SPLITTER), "isolated"),
      pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
  raw.decoder = decoders.ByteLevel()
  raw.train_from_iterator([*texts] * 4, trainers.BpeTrainer(
      vocab_size=vocab_size, show_progress=False,
      special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
      initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
  vocabulary = raw.get_vocab()
  assert not {"<think>", "</think>"} & vocabulary.keys()
  missing = [piece for piece in ACROSS if piece not in vocabulary]
  assert not missing, missing
  return tokenizer_lib.HuggingFaceTokenizer(
      raw, bos_id=None, eos_id=raw.token_to_id("<|im_end|>"),
      stop_ids=[raw.token_to_id("<|endoftext|>")],
      chat_template=chat_template)
