"""Getting bytes in and out: pyarrow filesystems behind DCP's storage interfaces."""
