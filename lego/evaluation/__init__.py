"""Numbers of models: routed ones and plain ones, thresholds, exit criteria, risk, latency, comparison."""
