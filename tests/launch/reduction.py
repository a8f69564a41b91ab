"""A program for `launch/local.py` to run: one jitted sum over every device."""

import jax

from posttrain import distributed

distributed.initialize()

import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402

from posttrain import sharding  # noqa: E402


def main() -> None:
  mesh = sharding.make_mesh(fsdp=4, tensor=2)
  numbers = np.arange(64, dtype=np.float32).reshape(8, 8)
  with jax.set_mesh(mesh):
    x = sharding.put(numbers, "batch", "vocab")
    total = jax.jit(lambda x: jnp.sum(x * x))(x)
    whole = sharding.fetch(x)
  np.testing.assert_array_equal(whole, numbers)
  print(
      f"process {jax.process_index()} of {jax.process_count()}, "
      f"{jax.local_device_count()} of {jax.device_count()} devices, "
      f"sum {float(total)}", flush=True)


if __name__ == "__main__":
  main()
