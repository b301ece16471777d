"""The network of transformers that a checkpoint is of: its module tree, and where its tensors are in it."""
