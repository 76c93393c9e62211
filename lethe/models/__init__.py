"""Naming, loading, checking and saving models; what layer L is."""
