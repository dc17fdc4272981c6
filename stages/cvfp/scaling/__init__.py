"""What CVFP is compared with, over seeds: a pipeline of its own (docs/cvfp.md)."""
