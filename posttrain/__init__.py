"""Post-training and test-time scaling of language models in JAX."""
