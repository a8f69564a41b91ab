"""Starts posttrain where the devices are; runs on a laptop, without JAX."""
