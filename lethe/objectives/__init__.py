"""Losses, each in a plain and a memory-saving form."""
