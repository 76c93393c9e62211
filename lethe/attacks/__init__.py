"""Fine-tuning, changed weights, prompts."""
