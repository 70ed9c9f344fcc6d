"""The questions of the design space: what each concludes from a study's table, and its figure.

A question is a module with `conclude(rows) -> (summary, finding)` and `draw(rows, summary) -> PNG`: both from the table alone.
"""
