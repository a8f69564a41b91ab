"""Our works and our peers', timed in turns, and as shares of the limit."""
