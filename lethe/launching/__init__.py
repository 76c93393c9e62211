"""Worker processes and Slurm jobs."""
