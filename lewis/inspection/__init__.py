"""Inspect before a merge whether its models belong together: measures of their task vectors, and findings in words."""
