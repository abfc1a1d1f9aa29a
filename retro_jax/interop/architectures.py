"""config.json of Hugging Face models that the decoder can be, to a `RetroConfig` and back.

Llama (with SmolLM and TinyLlama), Mistral, Qwen2 and 2.5, Qwen3 and GPT-2. A setting that the decoder cannot follow is
refused by name; none is passed over.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from retro_jax.config import RetroConfig, RopeScaling
from retro_jax.errors import UserError

T = TypeVar("T")

# What a config.json may leave out, as the architectures define it.
_LLAMA: dict[str, Any] = {
    "num_key_value_heads": None,
    "head_dim": None,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "rope_theta": 10_000.0,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "mlp_bias": False,
    "sliding_window": None,
}
_DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": _LLAMA,
    "mistral": _LLAMA | {"num_key_value_heads": 8, "sliding_window": 4096},
    "qwen2": _LLAMA | {"num_key_value_heads": 32, "use_sliding_window": False, "sliding_window": 4096},
    "qwen3": _LLAMA | {"num_key_value_heads": 32, "head_dim": 128, "use_sliding_window": False, "sliding_window": 4096},
    "gpt2": {
        "n_inner": None,
        "activation_function": "gelu_new",
        "layer_norm_epsilon": 1e-5,
        "tie_word_embeddings": True,
        "scale_attn_weights": True,
        "scale_attn_by_inverse_layer_idx": False,
        "add_cross_attention": False,
    },
}
# Settings that change what is computed and have one value only that the decoder follows.
_MUST_BE = {
    "hidden_act": ("silu", "swish"),
    "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "add_cross_attention": (False,),
    "partial_rotary_factor": (1, 1.0, None),
    "quantization_config": (None,),
}
# Numbers above 0, whole ones but for the last three.
_WHOLE = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "head_dim", "n_embd", "n_layer", "n_head", "n_inner", "n_positions"),
    "max_position_embeddings",
)
_POSITIVE = (*_WHOLE, "rope_theta", "rms_norm_eps", "layer_norm_epsilon")
# Of these null stands for what another setting gives.
_NULLABLE = ("num_key_value_heads", "head_dim", "n_inner", "max_position_embeddings", "rope_theta")
_FLAGS = ("tie_word_embeddings", "attention_bias", "mlp_bias", "use_sliding_window")
# What a config.json says that is no part of the architecture and yet the model's: its context, and ids, of which
# transformers takes several for the end.
_BESIDE = ("max_position_embeddings", "bos_token_id", "eos_token_id", "pad_token_id")


def read_config(values: dict[str, Any], path: Path) -> RetroConfig:
    """The baseline with the architecture of a config.json.

    Args:
      values: its content.
      path: of the file, for messages.

    Raises:
      UserError: an architecture that is not known, a size that is missing, or a setting that cannot be followed.
    """
    kind = values.get("model_type")
    if not isinstance(kind, str) or kind not in _DEFAULTS:
        raise UserError(f"{path}: model_type {kind!r} is not known; known: {', '.join(_DEFAULTS)}")
    values = _DEFAULTS[kind] | values
    for name, allowed in _MUST_BE.items():
        if values.get(name, allowed[0]) not in allowed:
            raise UserError(f"{path}: {name} {values[name]!r} is not supported, only {allowed[0]!r}")
    _check_numbers(values, path)
    for name in _FLAGS:
        if not isinstance(values.get(name, False), bool):
            raise UserError(f"{path}: {name} is {values[name]!r}, not true or false")
    read = _gpt2 if kind == "gpt2" else _llama
    try:
        fields = read(values, path) | _document_ids(values) | {"pad_id": values["vocab_size"]}
        return _made(RetroConfig, path, **fields)
    except KeyError as error:
        raise UserError(f"{path}: {error.args[0]} is missing, which every {kind} model has") from None
    except (TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{path}: a setting is of another type than {kind} models have ({error})") from None


def base_settings(values: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """What a config.json says of context and special tokens, which `write_config` writes back.

    Args:
      values: its content, or what this function gave once.
      path: of the file, for messages.

    Raises:
      UserError: the context is no number of tokens.
    """
    found = {name: values[name] for name in _BESIDE if name in values}
    _check_numbers(found, path)
    return found


def with_context(settings: Mapping[str, Any], context: int) -> dict[str, Any]:
    """The settings of a base that was trained on `context` tokens at a time, if not on more."""
    longest = max(settings.get("max_position_embeddings") or 0, context)
    return dict(settings) | ({"max_position_embeddings": longest} if longest else {})


def write_config(config: RetroConfig, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The config.json of the decoder alone, RETRO[OFF]; the inverse of `read_config`.

    Args:
      config: of the model.
      settings: as of `base_settings`; 2048 tokens of context where they name none.

    Raises:
      UserError: no Hugging Face architecture is this decoder; what stands in the way is named.
    """
    ids = {name: value for name, value in settings.items() if name.endswith("_token_id")}
    if config.positions == "learned":
        _require(config.attention_biases == "all" and config.ffw_biases, "GPT-2 has all biases")
        _require(config.norm == "layer" and config.ffw == "gelu", "GPT-2 has LayerNorm and GELU")
        _require(config.num_heads * config.head_size == config.width, "heads of GPT-2 make up the width")
        _require(config.kv_heads == config.num_heads and not config.qk_norm, "GPT-2 has plain attention")
        _require(not config.window, "GPT-2 has no window")
        return ids | {
            "architectures": ["GPT2LMHeadModel"],
            "model_type": "gpt2",
            "vocab_size": config.vocab_size,
            "n_embd": config.width,
            "n_layer": config.num_layers,
            "n_head": config.num_heads,
            "n_inner": config.ffw_width,
            "n_positions": config.max_positions,
            "activation_function": "gelu_new",
            "layer_norm_epsilon": config.norm_epsilon,
            "tie_word_embeddings": config.tie_embeddings,
        }
    _require(config.positions == "rope", f"positions are {config.positions}")
    _require(config.norm == "rms" and config.ffw == "swiglu", f"norm is {config.norm} and ffw {config.ffw}")
    kind = _llama_kind(config)
    values = ids | {
        "architectures": [{"llama": "Llama", "mistral": "Mistral"}.get(kind, kind.capitalize()) + "ForCausalLM"],
        "model_type": kind,
        "vocab_size": config.vocab_size,
        "hidden_size": config.width,
        "intermediate_size": config.ffw_width,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_size,
        "hidden_act": "silu",
        "rms_norm_eps": config.norm_epsilon,
        "rope_theta": config.rope_theta,
        "max_position_embeddings": settings.get("max_position_embeddings") or 2048,
        "tie_word_embeddings": config.tie_embeddings,
        "attention_bias": config.attention_biases == "all",
        "mlp_bias": config.ffw_biases,
    }
    if config.rope_scaling is not None:
        values["rope_scaling"] = _write_scaling(config.rope_scaling)
    if kind == "mistral":
        values["sliding_window"] = config.window
    elif kind in ("qwen2", "qwen3"):
        windowed = bool(config.window)
        values |= {"use_sliding_window": windowed, "sliding_window": config.window or None, "max_window_layers": 0}
        if not windowed:
            values["max_window_layers"] = config.num_layers
    return values


def _llama_kind(config: RetroConfig) -> str:
    """Which of the architectures around Llama has these biases, norms and window."""
    if config.qk_norm:
        kind, allowed = "qwen3", config.attention_biases != "qkv" and not config.ffw_biases
    elif config.attention_biases == "qkv":
        kind, allowed = "qwen2", not config.ffw_biases
    elif config.window:
        kind, allowed = "mistral", config.attention_biases == "none" and not config.ffw_biases
    else:
        return "llama"
    _require(allowed, f"{kind} has no attention_biases {config.attention_biases!r} with ffw_biases {config.ffw_biases}")
    return kind


def _check_numbers(values: dict[str, Any], path: Path) -> None:
    for name in _POSITIVE:
        if name not in values or (values[name] is None and name in _NULLABLE):
            continue
        value, kinds = values[name], int if name in _WHOLE else (int, float)
        if not isinstance(value, kinds) or isinstance(value, bool) or not value > 0:
            raise UserError(f"{path}: {name} is {value!r}, not a {'whole ' if kinds is int else ''}number above 0")


def _made(what: type[T], path: Path, /, **fields: Any) -> T:
    """A dataclass; what it says of a setting is said of the file that has it."""
    try:
        return what(**fields)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def _llama(values: dict[str, Any], path: Path) -> dict[str, Any]:
    kind, heads = values["model_type"], values["num_attention_heads"]
    return dict(
        vocab_size=values["vocab_size"],
        width=values["hidden_size"],
        num_layers=values["num_hidden_layers"],
        num_heads=heads,
        head_size=values["head_dim"] or values["hidden_size"] // heads,
        num_kv_heads=values["num_key_value_heads"] or heads,
        ffw_width=values["intermediate_size"],
        ffw="swiglu",
        ffw_biases=bool(values["mlp_bias"]) and kind == "llama",
        attention_biases="qkv" if kind == "qwen2" else "all" if _has_biases(values) else "none",
        qk_norm=kind == "qwen3",
        window=_window(values, path),
        positions="rope",
        **_rope(values, path),
        norm_epsilon=values["rms_norm_eps"],
        tie_embeddings=values["tie_word_embeddings"],
    )


def _gpt2(values: dict[str, Any], path: Path) -> dict[str, Any]:
    width, heads = values["n_embd"], values["n_head"]
    if width % heads:
        raise UserError(f"{path}: n_embd {width} is no multiple of n_head {heads}")
    return dict(
        vocab_size=values["vocab_size"],
        width=width,
        num_layers=values["n_layer"],
        num_heads=heads,
        head_size=width // heads,
        ffw_width=values["n_inner"] or 4 * width,
        positions="learned",
        max_positions=values["n_positions"],
        norm="layer",
        attention_biases="all",
        ffw_biases=True,
        norm_epsilon=values["layer_norm_epsilon"],
        tie_embeddings=values["tie_word_embeddings"],
    )


def _document_ids(values: dict[str, Any]) -> dict[str, int]:
    """BOS and EOS, of which the one stands for the other where a model has only one; what is unknown is spelt."""
    found = {}
    for name in ("bos_id", "eos_id"):
        token = values.get(name.replace("_id", "_token_id"))
        token = token[0] if isinstance(token, list) and token else token
        if isinstance(token, int):
            found[name] = token
    only = dict.fromkeys(("bos_id", "eos_id"), next(iter(found.values()))) if found else {}
    return only | found | {"unk_id": -1}


def _has_biases(values: dict[str, Any]) -> bool:
    return bool(values["attention_bias"]) and values["model_type"] in ("llama", "qwen3")


def _window(values: dict[str, Any], path: Path) -> int:
    if values["model_type"] == "mistral":
        return values["sliding_window"] or 0
    if not values.get("use_sliding_window") or not values["sliding_window"]:
        return 0
    layers = values["num_hidden_layers"]
    kinds = values.get("layer_types") or [
        "sliding_attention" if layer >= values.get("max_window_layers", 28) else "full_attention"
        for layer in range(layers)
    ]
    if len(set(kinds)) > 1:
        raise UserError(f"{path}: some layers have a sliding window and some have none, which is not supported")
    return values["sliding_window"] if kinds[0] == "sliding_attention" else 0


def _rope(values: dict[str, Any], path: Path) -> dict[str, Any]:
    """Settings of the rotary positions, which newer files keep together and older ones in two places."""
    scaling = values.get("rope_parameters") or values.get("rope_scaling") or {}
    theta = float(scaling.get("rope_theta", values["rope_theta"]))
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if scaling.get("partial_rotary_factor", 1) != 1:
        raise UserError(f"{path}: partial_rotary_factor {scaling['partial_rotary_factor']} is not supported, only 1")
    if kind == "default":
        return {"rope_theta": theta}
    original = scaling.get("original_max_position_embeddings") or values.get("max_position_embeddings", 0)
    if kind == "linear":
        found = {"factor": float(scaling["factor"])}
    elif kind == "llama3":
        found = {
            "factor": float(scaling["factor"]),
            "original_length": original,
            "low_frequency_factor": float(scaling["low_freq_factor"]),
            "high_frequency_factor": float(scaling["high_freq_factor"]),
        }
    elif kind == "yarn":
        for name in ("mscale", "mscale_all_dim"):
            if scaling.get(name):
                raise UserError(f"{path}: rotary positions 'yarn' with {name} {scaling[name]!r} are not supported")
        found = {
            "factor": float(scaling["factor"]),
            "original_length": original,
            "beta_fast": float(scaling.get("beta_fast") or 32),
            "beta_slow": float(scaling.get("beta_slow") or 1),
            "truncate": scaling.get("truncate", True),
            "attention_factor": float(scaling.get("attention_factor") or 0),
        }
    else:
        raise UserError(f"{path}: rotary positions {kind!r} are not supported, only default, linear, llama3 and yarn")
    return {"rope_theta": theta, "rope_scaling": _made(RopeScaling, path, kind=kind, **found)}


def _write_scaling(scaling: RopeScaling) -> dict[str, Any]:
    values: dict[str, Any] = {"rope_type": scaling.kind, "factor": scaling.factor}
    if scaling.kind != "linear":
        values["original_max_position_embeddings"] = scaling.original_length
    if scaling.kind == "llama3":
        values |= {"low_freq_factor": scaling.low_frequency_factor, "high_freq_factor": scaling.high_frequency_factor}
    if scaling.kind == "yarn":
        values |= {"beta_fast": scaling.beta_fast, "beta_slow": scaling.beta_slow, "truncate": scaling.truncate}
        if scaling.attention_factor:
            values["attention_factor"] = scaling.attention_factor
    return values


def _require(condition: bool, reason: str) -> None:
    if not condition:
        raise UserError(f"no Hugging Face architecture has this decoder: {reason}; export it with --format=safetensors")
