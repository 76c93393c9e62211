"""A run is a folder: its record, locks, importing logs."""
