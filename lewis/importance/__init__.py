"""Importance of each layer on calibration data: activation-weighted norms and second moments, one pass per model."""
