"""Bayesian low-rank adaptation of Llama models in a stochastic variational subspace (ScalaBL)."""

import warnings

with warnings.catch_warnings():
    # PyTorch says so once, while it is imported, where there is no NumPy; nothing here needs it.
    warnings.filterwarnings("ignore", message="Failed to initialize NumPy")
    import torch as _torch  # noqa: F401

from .errors import InputError
from .native import native_status
from .noise import Noise, philox4x32

__version__ = "0.1.0"

__all__ = ["InputError", "Noise", "native_status", "philox4x32"]
