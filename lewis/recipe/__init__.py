"""What the user asks for: the recipe, its schema, and what is wrong with it in the terms of its YAML."""
