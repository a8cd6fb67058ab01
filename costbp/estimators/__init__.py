"""Gradient estimators. A catalog entry builds its own: ``MethodEntry.build()``."""

from costbp.estimators.base import Estimate, Estimator

__all__ = ["Estimate", "Estimator"]
