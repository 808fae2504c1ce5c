"""Rewrites a checkpoint for another layout, without its model."""
