"""Merge by regression: the projections are fitted to what the experts do on their calibration rows."""
