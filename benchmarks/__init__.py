"""Tokens per second, and as shares of what this machine can do at best."""
