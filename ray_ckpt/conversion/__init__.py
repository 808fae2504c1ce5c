"""Checkpoints become what other programs read, and what they wrote becomes ours: `export` and `convert`."""
