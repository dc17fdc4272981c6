"""Pages that people read: intervals and verdicts, offline HTML, pictures."""
