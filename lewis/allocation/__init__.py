"""How much of each task vector to keep: evidence about the layers, and the densities that an allocator makes of it."""
