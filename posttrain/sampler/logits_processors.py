"""Logits processors: a user's changes to the logits of every decode step.

A processor is a pure function of the logits and of a state of its own, traced
into the loop. The state is a pytree with a leading row axis. A request brings
its row of it (`LogitsProcessor.init`), and the token that a step emits updates
it (`LogitsProcessor.observe`). A request that does not want the processor
brings a row that changes nothing: one program serves both.

  B: rows    V: vocabulary
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from posttrain.sampler import budget_state


@dataclasses.dataclass(frozen=True)
class LogitsProcessor:
  """Logits processor: three functions.

  Make it once: another one compiles another program.

  Attributes:
    init: (prompt, argument) -> pytree of NumPy arrays, one row's state. Its
      shapes are always the same; `argument` is
      `Request.logits_processor_args`, None by default.
    process: (state, logits) -> logits, [B, V] float32. It is called on the
      model's own logits, before bans, temperature and truncation. A forced
      token's logprob does not see it.
    observe: (state, emit) -> state, after the step.
  """

  init: Callable[[Sequence[int], Any], Any]
  process: Callable[[Any, jax.Array], jax.Array]
  observe: Callable[[Any, budget_state.Emit], Any] = (
      lambda state, emit: state)


def token_bias(vocab_size: int) -> LogitsProcessor:
  """Adds to the logits of chosen tokens; the argument is {id: bias}.

  An id may be a string, as JSON and configs have it.
  """
  def init(prompt, biases):
    row = np.zeros(vocab_size, np.float32)
    for token, bias in (biases or {}).items():
      row[int(token)] = bias
    return row

  return LogitsProcessor(init, lambda bias, logits: logits + bias)


def repetition_penalty(vocab_size: int) -> LogitsProcessor:
  """Makes tokens of the row so far less likely, its prompt's among them.

  A positive logit is divided by the penalty and a negative one multiplied
  (CTRL, arXiv 1909.05858, section 4.1, as transformers has it). The argument
  is {"penalty": number}; 1, and no argument, do nothing. If a delimiter is
  retracted for a wait, its tokens but the last count as seen.
  """
  def init(prompt, argument):
    # As a [V] mask: its shape is the same for every prompt.
    seen = np.zeros(vocab_size, bool)
    seen[list(prompt)] = True
    penalty = (argument or {"penalty": 1})["penalty"]
    return {"seen": seen, "penalty": np.float32(penalty)}

  def process(state, logits):
    penalty = state["penalty"][:, None]
    less = jnp.where(logits > 0, logits / penalty, logits * penalty)
    return jnp.where(state["seen"], less, logits)

  def observe(state, emit):
    new = jnp.arange(vocab_size) == emit.token[:, None]
    return state | {"seen": state["seen"] | new & emit.keep[:, None]}

  return LogitsProcessor(init, process, observe)
