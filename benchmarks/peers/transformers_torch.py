"""transformers' `generate`, and a bare training loop in torch."""

import torch

from benchmarks import serve, shapes
from benchmarks.peers import torch_models


def generate(size: shapes.Size, shape: shapes.Shape) -> None:
  model = torch_models.model(size).eval()
  prompts = torch.tensor(shapes.tokens(
      shape.prompts, shape.prompt, size.vocab_size))
  mask = torch.ones_like(prompts)
  turns = serve.Turns(shape.tokens)
  while turns.begin():
    with torch.inference_mode():
      found = model.generate(
          prompts, attention_mask=mask, do_sample=True, temperature=1.0,
          top_k=0, top_p=1.0, max_new_tokens=shape.new,
          pad_token_id=0)
    turns.end(found[:, shape.prompt:].numel())


def sft(size: shapes.Size, shape: shapes.Shape) -> None:
  model = torch_models.model(size).train()
  optimizer = torch.optim.AdamW(
      model.parameters(), lr=shapes.LEARNING_RATE, weight_decay=0.1)
  tokens = torch.tensor(shapes.tokens(
      shape.rows, shape.length, size.vocab_size))
  for _ in serve.runs(shape.tokens):
    logits = model(tokens, use_cache=False).logits[:, :-1]
    loss = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), tokens[:, 1:].flatten())
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    loss.item()


def main() -> None:
  size, work, shape = serve.arguments(__doc__, ("generate", "sft"))
  {"generate": generate, "sft": sft}[work](size, shape)


if __name__ == "__main__":
  main()
