"""Task runners: where the tasks of a run are executed."""
