"""Cost of the estimators against their floors, and against what people use today.

``python -m benchmarks`` runs everything; README.md says what each number means.
"""
