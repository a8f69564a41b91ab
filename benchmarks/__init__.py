"""Benchmarks: our works and our peers', in turns, and as shares of the limit.
"""
