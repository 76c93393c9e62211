"""Tasks, prompts, scoring, comparing two models, the checkpoint sweep."""
