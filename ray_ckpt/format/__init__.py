"""What a checkpoint is on disk: pure functions and values, no I/O."""
