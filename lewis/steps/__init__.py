"""The table of steps, the graph of a recipe (a DAG of steps), and the code that walks it without Prefect."""
