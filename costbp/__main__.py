"""``python -m costbp``: what the workflow's rules call, so that no PATH is needed."""

from costbp.cli import main

main()
