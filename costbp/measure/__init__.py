"""Cost, measured: FLOPs, forward units, peak bytes, wall time."""
