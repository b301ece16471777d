"""Try values of a recipe, keep the best."""
