"""The DAG: the table of steps, the graph of a recipe, and what walks it without Prefect."""
