"""Benchmarks: one command a suite, `mdm bench SUITE`; every figure is a ratio measured inside one run."""
