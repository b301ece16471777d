"""The layers of a model as a stack: the slices of a recipe, layers read under other numbers, their configs."""
