"""Random streams of the host, told apart by what they are for."""

import zlib

import numpy as np


def stream(
    seed: int, stage: str, purpose: str, *numbers: int,
) -> np.random.Generator:
  """Makes the generator of one purpose in one stage.

  Without stage and purpose in the key, the problems of one stage would come in
  the order of another's, or minibatches in the order of the data.

  Args:
    seed: of the run.
    stage: its name.
    purpose: what is drawn, such as "problems".
    numbers: an epoch or a batch; as many for every stream of a purpose.
  """
  return np.random.default_rng([
      seed, zlib.crc32(stage.encode()), zlib.crc32(purpose.encode()),
      *numbers])
