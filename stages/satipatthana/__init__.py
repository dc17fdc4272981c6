"""The pipeline of Satipatthana (docs/satipatthana.md)."""
