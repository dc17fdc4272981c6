"""One script per DVC stage: reads its deps, calls lego, writes its outs."""
