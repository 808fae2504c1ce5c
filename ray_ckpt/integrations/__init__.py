"""The verbs inside the training loops of others: a module imports its framework, and nothing of ray_ckpt imports it."""
