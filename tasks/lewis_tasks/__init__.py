"""Prefect tasks, a module for each part of a run. Decorators set cache, retries and timeout; `lewis` does the work."""
