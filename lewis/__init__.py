"""LEWIS (LayEr WIse Sparsity, arXiv 2503.03874) merging as a library: no Prefect, no MLflow, no network at import."""

__version__ = "0.1.0"
