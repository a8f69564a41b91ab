"""Random streams of the host, one for each purpose."""

import zlib

import numpy as np


def stream(
    seed: int, stage: str, purpose: str, *numbers: int,
) -> np.random.Generator:
  """Makes the generator of one purpose in one stage.

  Without stage and purpose in the key, the problems of one stage would come in
  the order of another's, or minibatches in the order of the data.

  Args:
    seed: the run's seed.
    stage: the stage's name.
    purpose: names the things that are drawn, such as "problems".
    numbers: an epoch or a batch; the same number of them for all streams of a
      purpose.
  """
  # NumPy mixes the list into one seed. Sums of seeds would collide: seed 1 of
  # epoch 0 would be seed 0 of epoch 1. CRC-32 is the same on every machine,
  # unlike Python's `hash` of a string.
  return np.random.default_rng([
      seed, zlib.crc32(stage.encode()), zlib.crc32(purpose.encode()),
      *numbers])
