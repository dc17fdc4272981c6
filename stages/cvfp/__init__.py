"""The pipeline of CVFP, one script per stage; parameters in stages/cvfp/params.yaml (docs/cvfp.md)."""
