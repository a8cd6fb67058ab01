"""Training: the loop, run records, devices, progress."""
