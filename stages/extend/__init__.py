"""The pipeline that extends a given model, and what its users would do instead (docs/extend.md)."""
