"""Post-training and test-time scaling of language models in JAX."""

__version__ = "0.3.0"
