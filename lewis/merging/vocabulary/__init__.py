"""The vocabulary of a merge: the tokens of the result, and each model's embedding rows in the order of these tokens."""
