"""The duration head under its official names, and its config in released metadata.

Source: `ltx_core/duration_head/model_configurator.py`.
"""

from collections.abc import Mapping
from typing import Any

from ltx2_jax.models.layers import Rngs
from ltx2_jax.models.text.duration_head import DurationHead, DurationHeadConfig

# Ours -> official.
_LINEARS = {
    "video.project": "video_input_proj",
    "audio.project": "audio_input_proj",
    "attention_out": "attention_pooler.cross_attn.out_proj",
    "mlp_in": "mlp_hidden",
    "mlp_out": "mlp_out",
}
TABLE = {
    f"{ours}.{leaf}": f"{official}.{name}"
    for ours, official in _LINEARS.items()
    for leaf, name in {"kernel": "weight", "bias": "bias"}.items()
} | {
    "video.modality": "video_modality_emb",
    "audio.modality": "audio_modality_emb",
    "queries": "attention_pooler.query_tokens",
    "qkv.kernel": "attention_pooler.cross_attn.in_proj_weight",
    "qkv.bias": "attention_pooler.cross_attn.in_proj_bias",
}


def create(config: DurationHeadConfig) -> DurationHead:
    """The network of a config, with weights that mean nothing."""
    return DurationHead(config, rngs=Rngs(0))


# Official key -> our field.
CONFIG_FIELDS = {
    "pooler_hidden_dim": "width",
    "num_queries": "num_queries",
    "num_pooler_heads": "num_heads",
    "mlp_hidden": "mlp_width",
}
CONTEXT_FIELDS = {
    "video_input_proj.weight": "video_context_dim",
    "audio_input_proj.weight": "audio_context_dim",
}


def duration_head_config(
    metadata: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]
) -> DurationHeadConfig:
    """The `duration_head` section of a released file's config -> `DurationHeadConfig`.

    The widths of the contexts, officially keys of the transformer's section, are taken from the
    projections among `shapes`, official name (prefix removed) -> shape.

    Raises:
      UserError: the width is not a multiple of the number of heads.
    """
    fields = {ours: metadata[key] for key, ours in CONFIG_FIELDS.items() if key in metadata}
    for name, ours in CONTEXT_FIELDS.items():
        if name in shapes:  # or it will be missed
            fields[ours] = shapes[name][1]
    return DurationHeadConfig(**fields)
