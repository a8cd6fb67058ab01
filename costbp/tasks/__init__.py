"""Tasks: one module each, with ``read(folder) -> Examples``."""
