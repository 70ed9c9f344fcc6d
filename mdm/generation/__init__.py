"""Prompts in, samples out: generation, editing, and the settings that it has by default."""
