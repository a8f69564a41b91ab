"""Other systems, each a script that `benchmarks.serve` talks to.

Nothing here is imported by ours: a script runs in the environment of its
`requirements`, which `environments.py` makes.
"""
