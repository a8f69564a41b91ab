"""Optimizers AdamW and Adafactor, and learning-rate schedules.

Weight decay skips norms and biases. Bytes of optimizer state per trained
parameter, without the vectors of a factored square, which are small:

  AdamW, float32: 8          AdamW, bfloat16: 4
  Adafactor, float32: 4      Adafactor, bfloat16: 2      beta1=0: 0

Adafactor differs from the paper in that its step is not scaled by the
parameter's own size, so that learning rates are those of AdamW.

References: Loshchilov and Hutter, https://arxiv.org/abs/1711.05101; Shazeer and
Stern, https://arxiv.org/abs/1804.04235. The upper bound on Adafactor's decay
and its mean in bfloat16: Zhai et al., https://arxiv.org/abs/2106.04560.
"""

import re
import zlib
from typing import Any

import jax
import jax.numpy as jnp
import optax

from posttrain.train import trainable

SCHEDULES = ("cosine", "linear", "constant")
OPTIMIZERS = ("adamw", "adafactor")
MOMENTS_DTYPES = ("float32", "bfloat16")
# Adafactor's constants, as published (sections 6 and 7): the decay of the
# square at step t is 1 - t**-0.8, and the root mean square of a parameter's
# update is clipped to 1 before the learning rate.
DECAY_EXPONENT = 0.8
LARGEST_RMS = 1.0


def make_schedule(
    *, schedule: str, learning_rate: float, warmup_steps: int, num_steps: int,
    final_learning_rate: float,
) -> optax.Schedule:
  """Makes the schedule: learning rate at step `s`, 0-based, before the update.

  It is linear from 0 over `warmup_steps` (so that step 0 of a warm-up moves
  nothing, as in Hugging Face's schedulers), then follows `schedule` down to
  `final_learning_rate` at `num_steps`.

  Raises:
    ValueError: the schedule is unknown.
  """
  if schedule == "constant":
    after: optax.Schedule = optax.constant_schedule(learning_rate)
  elif schedule == "linear":
    after = optax.linear_schedule(
        learning_rate, final_learning_rate, num_steps - warmup_steps)
  elif schedule == "cosine":
    after = optax.cosine_decay_schedule(
        learning_rate, max(num_steps - warmup_steps, 1),
        alpha=final_learning_rate / learning_rate if learning_rate else 0.0)
  else:
    raise ValueError(f"schedule={schedule!r}; choose from {SCHEDULES}.")
  warmup = optax.linear_schedule(0.0, learning_rate, warmup_steps)
  return optax.join_schedules([warmup, after], [warmup_steps])


def decay_mask(params: Any) -> Any:
  """Marks the leaves that weight decay shrinks: all but norms and biases."""
  return jax.tree_util.tree_map_with_path(
      lambda path, _: not re.search("norm|bias", trainable.path_name(path)),
      params)


def make_optimizer(
    *, beta1: float, beta2: float, eps: float, weight_decay: float,
    max_grad_norm: float, optimizer: str = "adamw",
    moments_dtype: str = "float32",
) -> optax.GradientTransformation:
  """Chains global-norm clipping, the optimizer's direction and weight decay.

  The learning rate is applied by `step.update`, from the state's step. There is
  one counter, so that a skipped step cannot shift the schedule.

  Args:
    beta1: decay of the mean of gradients (AdamW) or of scaled gradients
      (Adafactor, which keeps no mean if it is 0).
    beta2: decay of the square; Adafactor's grows up to it.
    eps: AdamW's epsilon.
    weight_decay: decoupled, times the learning rate.
    max_grad_norm: the gradient's global norm is clipped to it.
    optimizer: "adamw" or "adafactor".
    moments_dtype: "float32" or "bfloat16", for moments that have the shape of
      a parameter.

  Raises:
    ValueError: the optimizer or dtype is unknown.
  """
  if optimizer not in OPTIMIZERS or moments_dtype not in MOMENTS_DTYPES:
    raise ValueError(
        f"optimizer={optimizer!r}, moments_dtype={moments_dtype!r}; choose "
        f"from {OPTIMIZERS} and {MOMENTS_DTYPES}.")
  if optimizer == "adafactor":
    direction = _adafactor(beta1, beta2, moments_dtype)
  else:
    direction = optax.scale_by_adam(b1=beta1, b2=beta2, eps=eps)
    if moments_dtype == "bfloat16":
      direction = _kept_in_bfloat16(direction)
  return optax.chain(
      optax.clip_by_global_norm(max_grad_norm), direction,
      optax.add_decayed_weights(weight_decay, mask=decay_mask))


def _adafactor(
    beta1: float, beta2: float, dtype: str) -> optax.GradientTransformation:
  """Adafactor's direction: the square is a product of row and column means.

  The means are float32. Only a matrix whose sides are 128 or more is factored.
  Each of the stacked layers is factored for itself, and all of them are clipped
  together.
  """
  # Without the bound the decay tends to 1, and the square would stop to follow
  # the gradients in a long run.
  grown = lambda step, exponent: jnp.minimum(
      beta2, 1 - (step + 1.0) ** -exponent)
  parts = [
      optax.scale_by_factored_rms(
          decay_rate=DECAY_EXPONENT, decay_rate_fn=grown),
      optax.clip_by_block_rms(LARGEST_RMS)]
  if beta1:
    parts.append(optax.ema(
        beta1, debias=False, accumulator_dtype=jnp.dtype(dtype)))
  return optax.chain(*parts)


def _kept_in_bfloat16(
    adam: optax.GradientTransformation) -> optax.GradientTransformation:
  """Keeps Adam's moments in bfloat16 between steps, and float32 within one.

  The mean is rounded to the nearest. The square cannot be: with beta2 = 0.999 a
  step changes it by less than half of the last place, so that it could never
  shrink. It is rounded up or down at random, so that it is right on average.
  The noise depends on the step and the parameter alone.
  """
  to = lambda dtype, tree: jax.tree.map(lambda w: w.astype(dtype), tree)

  def init(params):
    state = adam.init(params)
    return state._replace(
        mu=to(jnp.bfloat16, state.mu), nu=to(jnp.bfloat16, state.nu))

  def update(grads, state, params=None):
    updates, state = adam.update(grads, state._replace(
        mu=to(jnp.float32, state.mu), nu=to(jnp.float32, state.nu)), params)
    key = jax.random.fold_in(jax.random.key(0), state.count)

    def rounded(path, square):
      # By name rather than by order, so that a resumed run with another set of
      # trained parameters rounds the shared ones alike.
      name = trainable.path_name(path)
      return stochastic_bfloat16(
          square, jax.random.fold_in(key, zlib.crc32(name.encode())))

    return updates, state._replace(
        mu=to(jnp.bfloat16, state.mu),
        nu=jax.tree_util.tree_map_with_path(rounded, state.nu))

  return optax.GradientTransformation(init, update)


def stochastic_bfloat16(x: jax.Array, key: jax.Array) -> jax.Array:
  """Rounds to bfloat16 at random, up or down; the mean is `x`.

  Args:
    x: any shape, float32, finite.
  """
  noise = jax.random.bits(
      key, x.shape, jnp.uint16, out_sharding=jax.typeof(x).sharding)
  bits = jax.lax.bitcast_convert_type(x, jnp.uint32) + noise
  # The upper half of a float32 is the bfloat16 towards zero. Noise that is
  # uniform over the lower half carries into it with just the probability of
  # the part that is cut off.
  return jax.lax.bitcast_convert_type(
      (bits >> 16).astype(jnp.uint16), jnp.bfloat16)
