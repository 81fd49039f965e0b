"""The shape of a model, and Hugging Face's config.json read and written."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..support.errors import InputError
from ..support.folders import FORMAT
from .attach import Device

MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3")


@dataclass(frozen=True)
class RopeConfig:
    """Rotary embedding: `kind` is "default", "linear" or "llama3".

    theta: base of the frequencies. factor: context extension of "linear" and "llama3". The other
    three belong to "llama3" alone; original_max_position_embeddings is in tokens.
    """

    kind: str = "default"
    theta: float = 10000.0
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192

    def __post_init__(self) -> None:
        for name, value in list(vars(self).items())[1:]:
            if not isinstance(value, (int, float)) or not 0 < value < math.inf:
                raise InputError(f"RoPE's {name} must be a number above 0, not {value!r}")

    def inverse_frequencies(self, head_dim: int, device: Device = None) -> Tensor:
        """Angle per token of each rotated pair, (h / 2,) float32, in radians."""
        exponent = torch.arange(0, head_dim, 2, device=device).float() / head_dim
        inverse = 1.0 / self.theta**exponent
        if self.kind == "linear":
            return inverse / self.factor
        if self.kind == "llama3":
            return self._llama3(inverse)
        return inverse

    def _llama3(self, inverse: Tensor) -> Tensor:
        """Long wavelengths slowed by `factor`, short ones kept, a ramp between (Llama 3.1)."""
        turns = self.original_max_position_embeddings * inverse / (2 * math.pi)
        span = self.high_freq_factor - self.low_freq_factor
        keep = ((turns - self.low_freq_factor) / span).clamp(0, 1)  # 1: short wavelength
        return keep * inverse + (1 - keep) * inverse / self.factor

    def to_hf(self) -> dict[str, Any] | None:
        """The value of rope_scaling in a Hugging Face config.json."""
        if self.kind == "default":
            return None
        values = {"rope_type": self.kind, "factor": self.factor}
        if self.kind == "llama3":
            for name in ("low_freq_factor", "high_freq_factor", "original_max_position_embeddings"):
                values[name] = getattr(self, name)
        return values

    @staticmethod
    def from_hf(config: dict[str, Any]) -> RopeConfig:
        """From a Hugging Face config: rope_theta and rope_scaling, or the newer rope_parameters.

        As in transformers 5, rope_scaling counts if both are there. Raises InputError naming the
        key for another kind of scaling, and for a value that is missing or has another type.
        """
        key, given = _rope_values(config)
        kind = given.get("rope_type") or given.get("type") or "default"
        if kind not in ("default", "linear", "llama3"):
            raise InputError(
                f"RoPE scaling {kind!r} is not known: expected default, linear, llama3"
            )
        if given.get("partial_rotary_factor", config.get("partial_rotary_factor")) not in (None, 1):
            raise InputError("RoPE on a part of each head is not implemented")
        theta = given.get("rope_theta", config.get("rope_theta", 10000.0))
        if kind == "default":
            return RopeConfig(theta=theta)
        needed, original = ["factor"], "original_max_position_embeddings"
        if kind == "llama3":
            needed += ["low_freq_factor", "high_freq_factor"]
            length = config.get(
                original, given.get(original, config.get("max_position_embeddings"))
            )
            given = {**given, original: 2048 if length is None else length}
            needed += [original]
        for name in needed:
            if name not in given:
                raise InputError(f"{key}: {name} is missing: RoPE scaling {kind!r} needs it")
        return RopeConfig(kind, theta, **{name: given[name] for name in needed})


def _rope_values(config: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """The key that holds a config.json's RoPE values, and these values."""
    found = {key: config.get(key) for key in ("rope_scaling", "rope_parameters")}
    for key, value in found.items():
        if not isinstance(value, dict | None):
            raise InputError(f"{key} must be an object or null, not {value!r:.40}")
        if any(isinstance(inner, dict) for inner in (value or {}).values()):
            raise InputError(f"{key}: RoPE that differs from layer to layer is not implemented")
    key = "rope_scaling" if found["rope_scaling"] else "rope_parameters"
    given, newer = found[key] or {}, found["rope_parameters"] or {}
    theta = given.get("rope_theta", config.get("rope_theta", 10000.0))
    if newer.get("rope_theta", theta) != theta:  # transformers 5 takes the default
        raise InputError(
            f"rope_theta {newer['rope_theta']} is in rope_parameters, but only rope_scaling counts "
            "if both are there: put rope_theta into rope_scaling"
        )
    return key, given


@dataclass(frozen=True)
class LlamaConfig:
    """Shape of a model; field names are those of Hugging Face's config.json.

    qkv_bias, output_bias, mlp_bias: biases on q/k/v, on o, on gate/up/down.
    qk_norm: RMSNorm over each head of q and k, before RoPE (Qwen3).
    head_tokens: token ids of the rows that the head was cut down to; None is the whole vocabulary.

    Raises InputError for a value outside its range.

    Example:

    >>> from scalabl_ref import LlamaConfig
    >>> config = LlamaConfig(
    ...     vocab_size=32, hidden_size=8, intermediate_size=16, num_hidden_layers=1,
    ...     num_attention_heads=2, num_key_value_heads=1, head_dim=4,
    ... )
    >>> config.max_position_embeddings
    2048
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int = 2048
    rms_norm_eps: float = 1e-6
    rope: RopeConfig = RopeConfig()
    tie_word_embeddings: bool = False
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    bos_token_id: int | None = None
    eos_token_id: int | None = None
    head_tokens: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self)[:8]:
            _check_size(field.name, getattr(self, field.name))
        if not isinstance(self.rms_norm_eps, (int, float)) or not self.rms_norm_eps >= 0:
            raise InputError(f"rms_norm_eps must be at least 0, not {self.rms_norm_eps!r}")
        if self.num_attention_heads % self.num_key_value_heads:
            raise InputError(
                f"num_attention_heads ({self.num_attention_heads}) must be a multiple of "
                f"num_key_value_heads ({self.num_key_value_heads})"
            )
        if self.head_dim % 2:
            raise InputError(f"head_dim must be even for RoPE, not {self.head_dim}")

    @staticmethod
    def from_hf(config: dict[str, Any]) -> LlamaConfig:
        """From the dictionary in a Hugging Face config.json.

        Raises InputError for a missing key, another architecture, or a feature not implemented.
        """
        kind = config.get("model_type", "llama")
        if kind not in MODEL_TYPES:
            raise InputError(f"model_type {kind!r} is not known: expected {', '.join(MODEL_TYPES)}")
        _refuse_codes(config)
        if config.get("hidden_act", "silu") != "silu":
            raise InputError(f"hidden_act {config['hidden_act']!r} is not known: expected 'silu'")
        sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")
        for key in (*sizes, "num_attention_heads"):
            if key not in config:
                raise InputError(f"key {key!r} is missing")
            _check_size(key, config[key])
        heads = config["num_attention_heads"]
        positions = config.get("max_position_embeddings", 2048)
        _check_size("max_position_embeddings", positions)
        window = _sliding_window(kind, config)
        if window is not None and window < positions:
            raise InputError(
                f"sliding-window attention ({window} tokens) is not implemented, and this window "
                f"is shorter than the model's {positions} positions"
            )
        bias = bool(config.get("attention_bias", False))
        eos = config.get("eos_token_id")  # Llama 3 lists several; the first ends a text
        return LlamaConfig(
            **{key: config[key] for key in sizes},
            num_attention_heads=heads,
            num_key_value_heads=config.get("num_key_value_heads") or heads,
            head_dim=config.get("head_dim") or config["hidden_size"] // heads,
            max_position_embeddings=positions,
            rms_norm_eps=config.get("rms_norm_eps", 1e-6),
            rope=RopeConfig.from_hf(config),
            tie_word_embeddings=bool(config.get("tie_word_embeddings", False)),
            qkv_bias=kind == "qwen2" or bias,
            output_bias=kind != "qwen2" and bias,
            mlp_bias=bool(config.get("mlp_bias", False)),
            qk_norm=kind == "qwen3",
            bos_token_id=config.get("bos_token_id"),
            eos_token_id=next(iter(eos), None) if isinstance(eos, list) else eos,
        )

    @staticmethod
    def from_dict(values: dict[str, Any]) -> LlamaConfig:
        """From either kind of config.json: Hugging Face's, or the converted layout's."""
        if values.get("format") != FORMAT:
            return LlamaConfig.from_hf(values)
        known = {field.name for field in dataclasses.fields(LlamaConfig)}
        fields = {key: value for key, value in values.items() if key in known}
        head_tokens = fields.get("head_tokens")
        try:
            fields["rope"] = RopeConfig(**fields.get("rope", {}))
            fields["head_tokens"] = None if head_tokens is None else tuple(head_tokens)
            return LlamaConfig(**fields)
        except TypeError as error:
            raise InputError(str(error).replace("__init__()", "configuration")) from None

    def to_hf(self) -> dict[str, Any]:
        """A Hugging Face config.json that `from_hf` reads back as this configuration.

        Raises InputError for what that layout cannot hold, such as a head cut down to class tokens.
        """
        if self.head_tokens is not None:
            raise InputError("the head was cut down to class tokens: a full head is needed")
        kind = "qwen3" if self.qk_norm else "llama"
        if self.qkv_bias and not self.output_bias:
            kind = "qwen2"
        name = {"llama": "Llama", "qwen2": "Qwen2", "qwen3": "Qwen3"}[kind]
        ours = {"rope", "qkv_bias", "output_bias", "mlp_bias", "qk_norm", "head_tokens"}
        fields = {k: v for k, v in dataclasses.asdict(self).items() if k not in ours}
        values = {
            "architectures": [f"{name}ForCausalLM"],
            "model_type": kind,
            "hidden_act": "silu",
            **fields,
            "rope_theta": self.rope.theta,
            "rope_scaling": self.rope.to_hf(),
        }
        if kind != "qwen2":
            values["attention_bias"] = self.qkv_bias
        if kind == "llama":
            values["mlp_bias"] = self.mlp_bias
        if LlamaConfig.from_hf(values) != self:
            raise InputError(
                "no Hugging Face architecture has this combination of biases and norms"
            )
        return values

    def to_dict(self) -> dict[str, Any]:
        """The converted layout's config.json; `from_dict` reads it back."""
        return {"format": FORMAT, **dataclasses.asdict(self)}


def _refuse_codes(config: dict[str, Any]) -> None:
    """Raise InputError naming the method if a config.json says that the weights were quantised."""
    for key in ("quantization_config", "compression_config", "quantization"):
        values = config.get(key)
        if not values:
            continue
        values = values if isinstance(values, dict) else {}
        method = (
            values.get("quant_method")
            or {
                "quantization_config": "bitsandbytes",  # its old files name no method
                "compression_config": "compressed-tensors",
                "quantization": "MLX",
            }[key]
        )
        raise InputError(
            f"{key}: the weights were quantised elsewhere, by {method!s:.40}: use the same model "
            "in 16 bits or more"
        )


def _sliding_window(kind: str, config: dict[str, Any]) -> int | None:
    """How many tokens, itself included, a query sees in layers with a window; None: no window.

    The keys and their defaults are transformers'.
    """
    slides = {"mistral": True, "llama": False}.get(kind, bool(config.get("use_sliding_window")))
    window = config.get("sliding_window", 4096)
    if not slides or window is None:
        return None
    _check_size("sliding_window", window)
    return window


def _check_size(name: str, value: Any) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise InputError(f"{name} must be a positive whole number, not {value!r}")
