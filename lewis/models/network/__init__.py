"""The transformers network of a checkpoint: its module tree, and the places of the checkpoint's tensors in it."""
