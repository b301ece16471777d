"""PEFT LoRA adapters as experts: their settings and keys, and what they change in a base."""
