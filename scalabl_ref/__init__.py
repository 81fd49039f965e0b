"""Bayesian low-rank adaptation of Llama models in a stochastic variational subspace (ScalaBL)."""

import warnings

from .support.errors import InputError, leave_command

try:
    with warnings.catch_warnings():
        # PyTorch says so once, while it is imported, without NumPy; nothing here needs that.
        warnings.filterwarnings("ignore", message="Failed to initialize NumPy")
        import torch as _torch  # noqa: F401

    from . import fast

    fast.install()

    from . import methods
    from .core.adapter import SubspaceAdapter, adapters
    from .core.config import AdapterConfig
    from .core.noise import Noise
    from .core.objective import Elbo, elbo, kl_forward, kl_official
    from .core.philox import philox4x32
    from .core.predictive import Prediction
    from .evaluation import metrics, plots
    from .evaluation.classifier import load
    from .evaluation.predict import predict
    from .fast.native import native_status
    from .model.attach import add_adapters
    from .model.config import LlamaConfig
    from .model.llama import Llama
    from .training.runs import load_run, save_run
    from .verify import reference

    subspace_lora_linear = SubspaceAdapter.op
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
    "load",
    "load_run",
    "methods",
    "metrics",
    "native_status",
    "philox4x32",
    "plots",
    "predict",
    "reference",
    "save_run",
    "subspace_lora_linear",
]
