"""Bayesian low-rank adaptation of Llama models in a stochastic variational subspace (ScalaBL)."""

import warnings

from .errors import InputError, leave_command

try:
    with warnings.catch_warnings():
        # PyTorch says so once, while it is imported, without NumPy; nothing here needs that.
        warnings.filterwarnings("ignore", message="Failed to initialize NumPy")
        import torch as _torch  # noqa: F401

    from . import methods, metrics, reference
    from .adapters import AdapterConfig, adapters, add_adapters
    from .elbo import Elbo, elbo, kl_forward, kl_official
    from .llama import Llama, LlamaConfig
    from .native import native_status
    from .noise import Noise, philox4x32
    from .ops import subspace_lora_linear
    from .predict import Prediction, predict
    from .train import load_run, save_run
except BaseException as error:  # ctrl-C or want of memory, before cli.main can catch it
    leave_command(error)
    raise

__version__ = "0.1.0"

__all__ = [
    "AdapterConfig",
    "Elbo",
    "InputError",
    "Llama",
    "LlamaConfig",
    "Noise",
    "Prediction",
    "adapters",
    "add_adapters",
    "elbo",
    "kl_forward",
    "kl_official",
    "load_run",
    "methods",
    "metrics",
    "native_status",
    "philox4x32",
    "predict",
    "reference",
    "save_run",
    "subspace_lora_linear",
]
