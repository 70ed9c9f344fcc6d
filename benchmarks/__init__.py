"""Benchmarks: one command a suite, `python -m benchmarks SUITE`; every figure is a ratio measured inside one run."""
