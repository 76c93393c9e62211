"""Unlearning methods, one file each: settings and loss."""
