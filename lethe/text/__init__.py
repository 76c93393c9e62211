"""Forget and retain text: reading, selecting, tokenising."""
