"""Find, fetch, read and write checkpoints: from the Hub or a folder, full models and LoRA adapters."""
