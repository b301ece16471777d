"""MLflow: versions, their lineage, aliases, releases and what is published."""
