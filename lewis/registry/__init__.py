"""The registry in MLflow: versions of merged models, their lineage, aliases and history, and publishing on the Hub."""
