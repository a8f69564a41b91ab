"""Sampler in NumPy, one row at a time, from parts that share no code with it.

The NumPy transformer gives logits, the plain-Python account of budget forcing
says which tokens are sampled and which forced, and the noise of each draw is
written out from the RNG contract: the key of a seed, into which the stage's
name, the step, the prompt's id, the sample's id and the row's own step are
folded, one after the other.
"""

import dataclasses
import functools
import zlib

import jax
import numpy as np

from posttrain.sampler import budget_state, token_sampling
from posttrain.sampler.rollouts import Rollouts
from posttrain.sampler.sampler import Limits, Sampler
from tests.model import numpy_transformer
from tests.sampler import forcing, test_token_sampling

# Two perturbed logits that are nearer than this may trade places in float32.
NEAR = 1e-4

SOURCES = {budget_state.SAMPLED: "sampled", budget_state.FORCED: "forced"}
CLOSED = {budget_state.OPEN: "open", budget_state.NATURAL: "natural",
          budget_state.CLOSED: "budget"}


def make_sampler(strings: forcing.Strings, *, max_prompt_tokens, chunk,
                 max_num_seqs=0, **params) -> Sampler:
  return Sampler(
      strings.tables(), token_sampling.SamplingParams(**params),
      max_prompt_tokens=max_prompt_tokens, chunk=chunk,
      max_num_seqs=max_num_seqs)


@dataclasses.dataclass(frozen=True)
class Request:
  """Request: all that a row's tokens depend on, besides the weights."""

  seed: int
  stage: str
  step: int
  first_draw: int = 0
  in_thinking: bool | None = None  # None: as the prompt says.


@functools.partial(jax.jit, static_argnames=("request", "vocab_size"))
def gumbels(request, prompt_id, sample_id, steps, vocab_size):
  """The noise [N, V] of one row's draws at `steps` [N]."""
  key = jax.random.key(request.seed, impl="threefry2x32")
  for part in (zlib.crc32(request.stage.encode()), request.step, prompt_id,
               sample_id):
    key = jax.random.fold_in(key, part)
  return jax.vmap(lambda step: jax.random.gumbel(
      jax.random.fold_in(key, step), (vocab_size,)))(steps)


def limits_of(limits: Limits, row: int) -> forcing.Limits:
  value = lambda x: np.ravel(x)[row if np.ndim(x) else 0].item()
  return forcing.Limits(
      maximum=value(limits.max_thinking_tokens),
      minimum=value(limits.min_thinking_tokens),
      waits=value(limits.num_waits), tokens=value(limits.max_tokens),
      truncate=value(limits.truncate),
      steps=value(limits.max_thinking_steps))


def in_thinking(prompt, strings: forcing.Strings) -> bool:
  """Thinking is on, and the prompt ends in the string that opens it."""
  return bool(strings.end) and (
      not strings.start or forcing.ends_in(prompt, strings.start))


def as_row(rollouts: Rollouts, row: int) -> forcing.Row:
  """Converts a row of the sampler to the words of the account."""
  length = rollouts.lengths[row]
  return forcing.Row(
      tokens=rollouts.completion(row),
      sources=[SOURCES[int(p)] for p in rollouts.provenance[row, :length]],
      finish=rollouts.finish_name(row),
      closed=CLOSED[int(rollouts.think_end[row])],
      thinking=int(rollouts.think_lengths[row]),
      answer=int(rollouts.answer_lengths[row]),
      waits=int(rollouts.wait_count[row]),
      steps=int(rollouts.think_steps[row]))


def retell(rollouts: Rollouts, row: int, strings, limits) -> forcing.Row:
  """The row that the rules make of the choices that the loop made.

  A choice that the rules forbid is a StopIteration.
  """
  choices = iter(rollouts.raw[row][rollouts.raw[row] >= 0].tolist())
  return forcing.reference(
      lambda context: [next(choices)], rollouts.prompts[row],
      in_thinking(rollouts.prompts[row], strings), strings,
      limits_of(limits, row))


def sample(params, config, rollouts: Rollouts, row: int, strings, limits,
           request: Request, **sampling):
  """The row, drawn anew.

  From `rollouts` it takes the prompt, the ids, and which steps of the row
  were draws; where its own best token and the sampler's lie within `NEAR`, it
  follows the sampler.

  Returns:
    The row, the log-probability of each of its tokens (of one that was
    forced, the model's own), and the number of near-ties.
  """
  prompt, raw = rollouts.prompts[row], rollouts.raw[row]
  draws = np.flatnonzero(raw >= 0)
  vocab_size = config.vocab_size
  noise = np.zeros((raw.size, vocab_size)) if (
      sampling.get("temperature") == 0) else np.asarray(gumbels(
          request, rollouts.prompt_id[row], rollouts.sample_id[row],
          np.arange(raw.size) + request.first_draw, vocab_size))
  remaining, logits, ties = iter(draws), {}, 0

  def model(context):
    nonlocal ties
    step = next(remaining)
    at = len(context) - len(prompt)
    logits[at] = numpy_transformer.logits(params, config, context)[-1]
    with np.errstate(divide="ignore"):
      perturbed = np.log(distribution(logits[at], **sampling)) + noise[step]
    best = perturbed.argmax()
    perturbed[raw[step]] += NEAR
    ties += int(best != perturbed.argmax())
    return np.argsort(-perturbed).tolist()

  thinks = request.in_thinking
  if thinks is None:
    thinks = in_thinking(prompt, strings)
  told = forcing.reference(
      model, prompt, thinks, strings, limits_of(limits, row))
  own = numpy_transformer.log_softmax(numpy_transformer.logits(
      params, config, prompt + told.tokens)[len(prompt) - 1:-1])
  logprobs = [
      np.log(distribution(
          logits[i], told.bans[i], **sampling)[token])
      if source == "sampled" else own[i, token]
      for i, (token, source) in enumerate(
          zip(told.tokens, told.sources, strict=True))]
  return told, np.array(logprobs), ties


def distribution(logits, banned=(), **sampling):
  """[V] probabilities; at temperature 0, those that are reported."""
  if sampling.get("temperature") == 0:
    sampling = {}
  return test_token_sampling.exact(logits, banned=banned, **sampling)
