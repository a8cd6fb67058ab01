"""Why: what theory says of estimates and of descent with them, measured on small problems."""
