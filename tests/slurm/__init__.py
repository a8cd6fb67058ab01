"""A real Slurm cluster of one node, for tests."""
