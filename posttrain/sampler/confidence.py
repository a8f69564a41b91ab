"""Running entropy and confidence of rows that decode (DeepConf).

Both are of the model's own distribution at a sampled token: temperature 1, no
truncation, ban or logits processor. A token's confidence is minus the mean of
the `top_k` largest logprobs, so that a surer model has more. The group
confidence is its mean over a sliding window of tokens.

Sampled tokens count. Forced ones are no choice of the model's, and tokens that
are retracted for a wait leave the running values again, exactly.

  B: rows  V: vocabulary  W: window  H: tokens that a retraction drops at most
  n: tokens of a completion

Reference: DeepConf, https://arxiv.org/abs/2508.15260, section 3. Unlike there,
a trace that is shorter than the window has no group while it decodes, and the
tail is one window and not always 2,048 tokens.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from posttrain.sharding import spec


@dataclasses.dataclass(frozen=True)
class Confidence:
  """Settings of the running values; static.

  Attributes:
    top_k: how many of the largest logprobs a token's confidence averages.
    window: W, tokens of a group.
  """

  top_k: int = 20
  window: int = 2048

  def __post_init__(self):
    for name in ("top_k", "window"):
      if getattr(self, name) < 1:
        raise ValueError(
            f"{name} is {getattr(self, name)} and must be 1 or more. Change "
            f"rollout.confidence_{name}.")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Running:
  """Running values of each row, behind its last sampled token.

  The values behind earlier tokens are kept for as far as a retraction goes. So
  a retraction moves `count` back, and no sum loses precision.

  Attributes:
    count: [B] int32, sampled tokens that were not retracted.
    values: [B, W + H] float32, confidence of token i in column i % (W + H).
    entropies, confidences: [B, H + 1] float32, means of the tokens up to token
      i, in column i % (H + 1).
    lowest: [B, H + 1] float32, the lowest group up to token i likewise; inf
      before the first full window.
    settings: top-k and window.
  """

  count: jax.Array
  values: jax.Array
  entropies: jax.Array
  confidences: jax.Array
  lowest: jax.Array
  settings: Confidence = dataclasses.field(metadata=dict(static=True))

  @property
  def mean_entropy(self) -> jax.Array:
    """[B] float32, nats, over all tokens so far; NaN without any."""
    return _read(self.entropies, self.count)

  @property
  def mean_confidence(self) -> jax.Array:
    """[B] float32, nats, over all tokens so far; NaN without any."""
    return _read(self.confidences, self.count)

  @property
  def group(self) -> jax.Array:
    """[B] float32, confidence of the last W tokens; NaN of fewer than W."""
    size, window = self.values.shape[1], self.settings.window
    age = (self.count[:, None] - 1 - jnp.arange(size)) % size
    total = jnp.sum(jnp.where(age < window, self.values, 0), axis=1)
    return jnp.where(self.count >= window, total / window, jnp.nan)

  @property
  def lowest_group(self) -> jax.Array:
    """[B] float32, the lowest `group` so far; NaN without any."""
    lowest = _read(self.lowest, self.count)
    return jnp.where(lowest < jnp.inf, lowest, jnp.nan)

  def restart(self) -> "Running":
    """Returns the values before the first token; no other field is read."""
    return dataclasses.replace(self, count=jnp.zeros_like(self.count))


def init(settings: Confidence, count: jax.Array, retracted: int) -> Running:
  """Makes the values before the first token.

  Args:
    count: [B] int32, zeros.
    retracted: H.
  """
  def zeros(columns: int) -> jax.Array:
    return jnp.zeros((count.size, columns), out_sharding=spec("rows", None))

  return Running(
      count, zeros(settings.window + retracted), zeros(retracted + 1),
      zeros(retracted + 1), zeros(retracted + 1), settings)


def measure(logits: jax.Array, top_k: int) -> tuple[jax.Array, jax.Array]:
  """Computes entropy and token confidence, [B] float32 each, in nats.

  Args:
    logits: [B, V] float32, the model's own.
    top_k: see `Confidence`.

  Raises:
    ValueError: the vocabulary has fewer than `top_k` tokens.
  """
  if top_k > logits.shape[-1]:
    raise ValueError(
        f"The confidence averages {top_k} logprobs, and the vocabulary has "
        f"{logits.shape[-1]} tokens. Lower rollout.confidence_top_k.")
  # Below the largest logit, so that a sure model's entropy does not cancel. It
  # is not read from the top-k: XLA sorts the vocabulary for two slices of one.
  largest = jnp.max(logits, axis=-1, keepdims=True)
  below = logits - largest
  weights = jnp.exp(below)
  mass = jnp.sum(weights, axis=-1)
  entropy = jnp.log(mass) - jnp.sum(weights * below, axis=-1) / mass
  top = jax.lax.top_k(logits, top_k)[0] - largest
  return entropy, jnp.log(mass) - jnp.mean(top, axis=-1)


def update(
    running: Running, entropy: jax.Array, confidence: jax.Array,
    sampled: jax.Array, dropped: jax.Array,
) -> Running:
  """Takes retracted tokens out, and adds a token.

  Args:
    running: the values behind the last step.
    entropy, confidence: [B] float32, see `measure`.
    sampled: [B] bool, rows whose step emits a sampled token.
    dropped: [B] int32, earlier tokens, all sampled, that it retracts first.
  """
  before = running.count - dropped
  count = before + sampled

  def write(values: jax.Array, new: jax.Array) -> jax.Array:
    # As a select: the layout of a scatter would be ambiguous.
    here = jnp.arange(values.shape[1]) == (before % values.shape[1])[:, None]
    return jnp.where(here & sampled[:, None], new[:, None], values)

  def average(means: jax.Array, new: jax.Array) -> jax.Array:
    mean = jnp.where(before > 0, _read(means, before), 0)
    return write(means, mean + (new - mean) / count)

  lowest = jnp.where(before > 0, _read(running.lowest, before), jnp.inf)
  running = dataclasses.replace(
      running, count=count, values=write(running.values, confidence),
      entropies=average(running.entropies, entropy),
      confidences=average(running.confidences, confidence))
  return dataclasses.replace(running, lowest=write(
      running.lowest, jnp.fmin(lowest, running.group)))


def _read(values: jax.Array, count: jax.Array) -> jax.Array:
  """Reads the column of each row's token number `count` - 1; NaN of none."""
  size = values.shape[1]
  here = jnp.arange(size) == ((count - 1) % size)[:, None]
  found = jnp.sum(jnp.where(here, values, 0), axis=1)
  return jnp.where(count > 0, found, jnp.nan)


def groups(values: np.ndarray, window: int) -> np.ndarray:
  """Computes the confidence of every full window of a completion.

  Args:
    values: [n] confidence of its sampled tokens.
    window: W.

  Returns:
    [n - W + 1] float64; of a shorter completion its mean, [1]; of none [0].
  """
  sums = np.cumsum(np.concatenate([[0.0], values]))  # float64
  width = min(window, len(values))
  return (sums[width:] - sums[:-width]) / width if width else sums[:0]


def summary(
    entropy: np.ndarray, confidence: np.ndarray, window: int,
) -> dict[str, float | None]:
  """Summarises a completion for its record; floats, None without tokens.

  Args:
    entropy, confidence: [n] of its sampled tokens.
    window: W, of the groups and of the tail.
  """
  found = groups(confidence, window)
  mean = lambda values: float(np.mean(values)) if len(values) else None
  return {
      "mean_entropy": mean(entropy), "mean_confidence": mean(confidence),
      "lowest_group_confidence": float(found.min()) if len(found) else None,
      "tail_confidence": mean(confidence[-window:])}
