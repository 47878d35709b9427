"""LTX-2 in JAX: joint audio-video diffusion, from one CPU core to a TPU pod."""

import importlib
from typing import Any

__version__ = "0.1.0"

# Imported when first used: `import ltx2_jax` is quick, and leaves time to set the environment
# variables that jax reads when it is imported.
_HOMES = {
    "Clip": "media.media",
    "Config": "config",
    "LTX2Transformer": "models.transformer.transformer",
    "PRESETS": "models.transformer.config",
    "Pipeline": "sampling.pipeline",
    "Recipe": "sampling.recipes",
    "Stage": "sampling.recipes",
    "Strength": "sampling.loras",
    "TextEncoder": "text.encoder",
    "TransformerConfig": "models.transformer.config",
    "UserError": "errors",
    "decode_clip": "codecs.clips",
    "encode_clip": "codecs.clips",
    "load_codec": "codecs.codec",
    "make_mesh": "sharding",
    "open_release": "weights.sources",
    "read_clip": "media.media",
    "read_lora": "weights.lora",
    "write_clip": "codecs.clips",
}

__all__ = ["__version__", *_HOMES]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value  # so that this function is asked once for a name
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
