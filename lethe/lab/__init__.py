"""The built-in world: its text, questions and pretraining."""
