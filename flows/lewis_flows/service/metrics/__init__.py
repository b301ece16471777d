"""The metrics that Prometheus reads: where each number comes from, and how long it is kept."""
