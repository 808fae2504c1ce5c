"""Save a PyTorch training run from any parallel layout, load it into any other, and prove nothing changed."""
