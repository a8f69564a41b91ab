"""A logits hook: what a user adds to every step of the decode loop.

A hook is a pure function of the logits and of a state of its own, traced into
the loop. The state is a pytree with a leading row axis; a request brings its
row of it (`Hook.init`), and what the step emits moves it on (`Hook.observe`).
Requests that do not want the hook bring a row that does nothing: one program
serves both.

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
class Hook:
  """Three functions; make it once, as another one is another program.

  Attributes:
    init: (prompt, argument) -> pytree of NumPy arrays, one row's state. Its
      shapes are always the same; `argument` is `Request.hook`, None by
      default.
    process: (state, logits) -> logits, [B, V] float32. Called before bans,
      temperature and truncation, on the model's own logits. A forced token's
      logprob does not see it.
    observe: (state, emit) -> state, after the step.
  """

  init: Callable[[Sequence[int], Any], Any]
  process: Callable[[Any, jax.Array], jax.Array]
  observe: Callable[[Any, budget_state.Emit], Any] = (
      lambda state, emit: state)


def token_bias(vocab_size: int) -> Hook:
  """Adds to the logits of chosen tokens; the argument is {id: bias}.

  An id may be a string, as JSON and configs have it.
  """
  def init(prompt, biases):
    row = np.zeros(vocab_size, np.float32)
    for token, bias in (biases or {}).items():
      row[int(token)] = bias
    return row

  return Hook(init, lambda bias, logits: logits + bias)


def repetition_penalty(vocab_size: int) -> Hook:
  """Makes tokens of the row so far less likely, its prompt's among them.

  A positive logit is divided by the penalty and a negative one multiplied
  (CTRL, arXiv 1909.05858, as transformers has it). The argument is
  {"penalty": number}; 1, and no argument, do nothing. Of a delimiter that is
  taken back for a wait, only what was not its last token counts as seen.
  """
  def init(prompt, argument):
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

  return Hook(init, process, observe)
