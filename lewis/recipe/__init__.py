"""The recipe, the user's YAML file for a merge: its schema, its parser and its checks, which name YAML paths."""
