"""The harness counts; its figures are for people."""

from benchmarks import workers


def test_it_measures_calls_in_and_out_of_process():
  found = workers.measure(
      workers.parse(["--calls=8", "--repeats=3", "--workers=1"]))
  assert found["calls"] == 8
  for name in ("start_s", "close_s", "in_process_us", "pool_us",
               "pool_cpu_here_us", "replace_ms"):
    assert found[name] > 0
  assert found["pool_us"] > found["in_process_us"]
