"""How good a model is: its NELBO, judges, scores, and lm-evaluation-harness."""
