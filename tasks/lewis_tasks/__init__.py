"""Prefect tasks, one file for each step. The decorator shows cache key, retries and timeout; lewis does the work."""
