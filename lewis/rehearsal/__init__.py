"""Ask transformers, PEFT and lm-eval what they say to a config, an adapter or a task, before any work that needs it."""
