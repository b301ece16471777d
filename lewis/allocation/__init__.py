"""How much of each task vector to keep: evidence about the layers, strategies, densities."""
