"""Prefect tasks, by parts of a run. The decorator shows cache key, retries and timeout; lewis does the work."""
