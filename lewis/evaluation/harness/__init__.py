"""Run lm-eval on a model, in a child process that has no secrets and runs no code without permission."""
