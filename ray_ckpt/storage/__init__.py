"""Getting bytes in and out: files on any file system, reading and writing checkpoints, the store of steps."""
