"""Blocks above block 2, any number of them: dvc repro stages/cascade/dvc.yaml, docs/cascade.md."""
