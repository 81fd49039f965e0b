"""Checks of this package and of others: `scalabl verify`, the conformance kit, `check_grads`."""

from .gradients import GradientCheck, check_grads

__all__ = ["GradientCheck", "check_grads"]
