"""Numbers of models: routed ones and plain ones, thresholds and how criteria route, risk, latency, comparison."""
