"""Scores that know no model: FID, CLIP score, GenEval, word errors, Frechet distance, n-grams, mel spectrograms."""
