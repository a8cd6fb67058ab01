"""The command line: what the workflow's rules call, and what people call by hand."""

from costbp.cli import cost, doctor, fit, insight, study  # they register their commands
from costbp.cli.app import app, main

__all__ = ["app", "cost", "doctor", "fit", "insight", "main", "study"]
