"""Scores by lm-eval, paired comparisons, and the gate's verdict."""
