"""Score one model with lm-eval."""
