"""What the tests stand on: real servers and tiny checkpoints."""
