"""Numbers of models: routed ones and plain ones, exit criteria, risk, latency, comparison."""
