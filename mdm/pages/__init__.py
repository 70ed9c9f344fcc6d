"""What a user looks at: reports, comparisons, films, files, and the demo."""
