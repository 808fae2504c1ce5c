"""The command `ray-ckpt`: each of its commands is one call of a Python function, and prints what that returns."""
