"""Tests of real things: real processes, real Ray, real files. `tests.` is a package so that workers can import it."""
