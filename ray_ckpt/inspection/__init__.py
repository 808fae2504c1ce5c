"""Looking at checkpoints without a model: what is in a store, in a checkpoint, in a tensor, and how two differ."""
