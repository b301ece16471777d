"""Models of the Hugging Face Hub and local folders: pinned to their content, downloaded, verified."""
