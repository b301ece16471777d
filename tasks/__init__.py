"""One file per Prefect task: cache key, retries, timeout and slot visible in the decorator, no algorithm inside."""
