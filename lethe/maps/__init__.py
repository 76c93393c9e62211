"""Affine maps: fitting and scoring."""
