"""What each layer does on calibration data: norms and second moments, measured in one pass per model."""
