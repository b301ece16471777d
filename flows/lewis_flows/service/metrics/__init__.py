"""What Prometheus reads: where each number comes from, and how long it is kept."""
