"""Launchers: start posttrain where the devices are; no JAX is needed here.
"""
