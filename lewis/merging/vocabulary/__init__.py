"""The vocabulary of a merge: which tokens the result has, and the rows of each model in their order."""
