"""Tasks: one module each, which defines ``TASK``."""
