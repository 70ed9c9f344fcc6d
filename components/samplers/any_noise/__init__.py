"""Samplers for noise of any kind: tokens may change until time is over."""
