"""Other data and other jobs, each a profile: dvc repro stages/satipatthana/tasks/dvc.yaml."""
