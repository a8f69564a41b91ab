"""Torch models: model, tokenizer and settings of the systems that use torch."""

import os

import tokenizers
import torch
import transformers

from benchmarks import shapes


def model(size: shapes.Size) -> transformers.LlamaForCausalLM:
  """Makes random weights; no end-of-sequence id, so that nothing stops early.
  """
  torch.manual_seed(0)
  torch.set_num_threads(os.cpu_count() or 1)
  config = transformers.LlamaConfig(
      vocab_size=size.vocab_size, hidden_size=size.embed,
      intermediate_size=size.mlp, num_hidden_layers=size.layers,
      num_attention_heads=size.heads, num_key_value_heads=size.kv_heads,
      head_dim=size.head_dim, max_position_embeddings=2048,
      tie_word_embeddings=True, initializer_range=shapes.INIT_STD,
      bos_token_id=None, eos_token_id=None, pad_token_id=None)
  found = transformers.LlamaForCausalLM(config)
  assert found.dtype == torch.float32
  return found


def tokenizer(size: shapes.Size) -> transformers.PreTrainedTokenizerFast:
  """Makes a word for each id; end and padding are ids that no model draws."""
  special = {"eos_token": "<eos>", "pad_token": "<pad>"}
  vocabulary = {shapes.word(i): i for i in range(size.vocab_size)}
  vocabulary |= {name: size.vocab_size + i
                 for i, name in enumerate(special.values())}
  words = tokenizers.Tokenizer(
      tokenizers.models.WordLevel(vocabulary, unk_token="<eos>"))
  words.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
  return transformers.PreTrainedTokenizerFast(
      tokenizer_object=words, padding_side="left", **special)


class Hooks(transformers.TrainerCallback):
  """A Trainer's callback that makes each of its steps a run."""

  def __init__(self, turns):
    self._turns = turns

  def on_train_begin(self, args, state, control, **kwargs):
    self._turns.begin()

  def on_step_end(self, args, state, control, **kwargs):
    self._turns.end()
    control.should_training_stop = not self._turns.begin()


def trainer_settings() -> dict:
  """Settings: float32 on the CPU, AdamW, nothing written, no end in sight."""
  return dict(
      output_dir="/tmp/never-written", use_cpu=True, bf16=False, fp16=False,
      gradient_checkpointing=False, optim="adamw_torch",
      learning_rate=shapes.LEARNING_RATE, lr_scheduler_type="constant",
      weight_decay=0.1, max_grad_norm=1.0, max_steps=10_000,
      save_strategy="no", report_to="none", disable_tqdm=True,
      dataloader_pin_memory=False)
