"""Prefect flows, which join the tasks: merge, search and watch; the command line and the service that run them."""
