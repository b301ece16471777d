"""Search the values of a recipe: merge and score trials, and keep the best."""
