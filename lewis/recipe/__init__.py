"""What the user asks for: the recipe, its schema, its problems told in the terms of its YAML."""

from lewis.recipe.recipe import Recipe

__all__ = ["Recipe"]
