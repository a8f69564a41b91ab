"""Peers: other systems, each a script that `benchmarks.serve` talks to.

Ours imports none of them: a script runs in the environment of its
`requirements`, which `environments.py` makes.
"""
