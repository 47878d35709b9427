"""The transformer under its official names, and its config in released metadata.

Source: `ltx_core/model/transformer/model_configurator.py` (config keys, asserted constants).
"""

from collections.abc import Mapping
from typing import Any

from ltx2_jax.errors import UserError
from ltx2_jax.models.layers import Rngs
from ltx2_jax.models.transformer.config import TransformerConfig
from ltx2_jax.models.transformer.transformer import LTX2Transformer
from ltx2_jax.weights.mapping import inside

# ---- names: ours -> official ---------------------------------------------------------------------

LINEAR = {"weight": "weight", "bias": "bias"}
ATTENTION = {
    **{f"{name}.{leaf}": f"{name}.{leaf}" for name in ("to_q", "to_k", "to_v") for leaf in LINEAR},
    **{f"to_out.{leaf}": f"to_out.0.{leaf}" for leaf in LINEAR},
    **{f"to_gate.{leaf}": f"to_gate_logits.{leaf}" for leaf in LINEAR},
    "q_norm": "q_norm.weight",
    "k_norm": "k_norm.weight",
}
FEED_FORWARD = {
    **{f"linear_in.{leaf}": f"net.0.proj.{leaf}" for leaf in LINEAR},
    **{f"linear_out.{leaf}": f"net.2.{leaf}" for leaf in LINEAR},
}
_ADALN = {
    **{f"linear_1.{leaf}": f"emb.timestep_embedder.linear_1.{leaf}" for leaf in LINEAR},
    **{f"linear_2.{leaf}": f"emb.timestep_embedder.linear_2.{leaf}" for leaf in LINEAR},
    **{f"linear.{leaf}": f"linear.{leaf}" for leaf in LINEAR},
}
_OUTSIDE = {
    "video.project_in": ("patchify_proj", LINEAR),
    "audio.project_in": ("audio_patchify_proj", LINEAR),
    "video.adaln": ("adaln_single", _ADALN),
    "audio.adaln": ("audio_adaln_single", _ADALN),
    "video.prompt_adaln": ("prompt_adaln_single", _ADALN),
    "audio.prompt_adaln": ("audio_prompt_adaln_single", _ADALN),
    "video.cross_adaln": ("av_ca_video_scale_shift_adaln_single", _ADALN),
    "audio.cross_adaln": ("av_ca_audio_scale_shift_adaln_single", _ADALN),
    "video.cross_gate_adaln": ("av_ca_a2v_gate_adaln_single", _ADALN),
    "audio.cross_gate_adaln": ("av_ca_v2a_gate_adaln_single", _ADALN),
    "video.caption_in": ("caption_projection.linear_1", LINEAR),
    "video.caption_out": ("caption_projection.linear_2", LINEAR),
    "audio.caption_in": ("audio_caption_projection.linear_1", LINEAR),
    "audio.caption_out": ("audio_caption_projection.linear_2", LINEAR),
    "video.project_out": ("proj_out", LINEAR),
    "audio.project_out": ("audio_proj_out", LINEAR),
}
_INSIDE = {
    "video_self": ("attn1", ATTENTION),
    "audio_self": ("audio_attn1", ATTENTION),
    "video_text": ("attn2", ATTENTION),
    "audio_text": ("audio_attn2", ATTENTION),
    "audio_to_video": ("audio_to_video_attn", ATTENTION),
    "video_to_audio": ("video_to_audio_attn", ATTENTION),
    "video_mlp": ("ff", FEED_FORWARD),
    "audio_mlp": ("audio_ff", FEED_FORWARD),
}
_TABLES = {
    "video_table": "scale_shift_table",
    "audio_table": "audio_scale_shift_table",
    "video_prompt_table": "prompt_scale_shift_table",
    "audio_prompt_table": "audio_prompt_scale_shift_table",
    "video_cross_table": "scale_shift_table_a2v_ca_video",
    "audio_cross_table": "scale_shift_table_a2v_ca_audio",
}


KEYFRAME = "keyframes_abs_pos_embedding"  # files may lack it; upstream takes it for zero then
TABLE = {
    "video.keyframe": KEYFRAME,
    "video.head_table": "scale_shift_table",
    "audio.head_table": "audio_scale_shift_table",
    **{k: v for ours, row in _OUTSIDE.items() for k, v in inside(ours, *row).items()},
    **inside("blocks", "transformer_blocks.{}", _TABLES),
    **{
        k: v
        for ours, (official, leaves) in _INSIDE.items()
        for k, v in inside(f"blocks.{ours}", f"transformer_blocks.{{}}.{official}", leaves).items()
    },
}


def create(cfg: TransformerConfig) -> LTX2Transformer:
    """The network of a config, with weights that mean nothing."""
    return LTX2Transformer(cfg, rngs=Rngs(0))


# ---- config --------------------------------------------------------------------------------------

# Official config key -> our field, with the official default.
CONFIG_FIELDS = {
    "num_layers": ("num_layers", 48),
    "num_attention_heads": ("num_heads", 32),
    "attention_head_dim": ("head_dim", 128),
    "audio_num_attention_heads": ("audio_num_heads", 32),
    "audio_attention_head_dim": ("audio_head_dim", 64),
    "in_channels": ("in_channels", 128),
    "out_channels": ("out_channels", 128),
    "audio_in_channels": ("audio_in_channels", 128),
    "audio_out_channels": ("audio_out_channels", 128),
    "cross_attention_dim": ("context_dim", 4096),
    "audio_cross_attention_dim": ("audio_context_dim", 2048),
    "norm_eps": ("norm_eps", 1e-6),
    "positional_embedding_theta": ("rope_theta", 10000.0),
    "positional_embedding_max_pos": ("max_pos", (20, 2048, 2048)),
    "audio_positional_embedding_max_pos": ("audio_max_pos", (20,)),
    "timestep_scale_multiplier": ("timestep_scale", 1000),
    "av_ca_timestep_scale_multiplier": ("cross_gate_timestep_scale", 1),
    "rope_type": ("rope_type", "split"),
    "frequencies_precision": ("rope_precision", "float32"),
    "apply_gated_attention": ("gated_attention", False),
    "cross_attention_adaln": ("modulated_text_attention", False),
    "use_prompt_adaln_single": ("prompt_adaln", True),
    "ff_bias": ("ff_bias", True),
    "audio_ff_bias": ("audio_ff_bias", True),
    "use_keyframes_abs_pos_embedding": ("keyframe_embedding", False),
}

# Captions are projected before the connectors, not inside (2.3, 2.5): all of these, or none.
CAPTIONS_BEFORE = {
    "caption_proj_before_connector": True,
    "caption_projection_first_linear": False,
    "caption_proj_input_norm": False,
    "caption_projection_second_linear": False,
}

# Any other value of these means a network that this code does not compute.
ASSERTED = {
    "dropout": 0.0,
    "attention_bias": True,
    "num_vector_embeds": None,
    "activation_fn": "gelu-approximate",
    "num_embeds_ada_norm": 1000,
    "use_linear_projection": False,
    "only_cross_attention": False,
    "double_self_attention": False,
    "upcast_attention": False,
    "share_ff": False,
    "cross_attention_norm": True,
    "standardization_norm": "rms_norm",
    "norm_elementwise_affine": False,
    "qk_norm": "rms_norm",
    "positional_embedding_type": "rope",
    "use_audio_video_cross_attention": True,
    "av_cross_ada_norm": True,
    "use_middle_indices_grid": True,
}


def transformer_config(metadata: Mapping[str, Any], **overrides: Any) -> TransformerConfig:
    """The `transformer` section of a released file's config -> `TransformerConfig`.

    `overrides` are our own fields (dtype, remat, ...), which released files do not have.

    Raises:
      UserError: an asserted constant has another value; all of them are listed.
    """
    wrong = [
        f"{key}={metadata[key]!r} (only {value!r} is implemented)"
        for key, value in ASSERTED.items()
        if key in metadata and metadata[key] != value
    ]
    if wrong:
        raise UserError(f"unsupported transformer config: {', '.join(wrong)}")
    fields = {ours: metadata.get(key, value) for key, (ours, value) in CONFIG_FIELDS.items()}
    for name in ("max_pos", "audio_max_pos"):
        fields[name] = tuple(float(value) for value in fields[name])
    fields["prompt_adaln"] = fields["prompt_adaln"] and fields["modulated_text_attention"]
    if metadata.get("caption_proj_before_connector", False):
        fields["caption_channels"] = None
    else:
        fields["caption_channels"] = metadata.get("caption_channels", 3840)
    return TransformerConfig(**(fields | overrides))


def section_of(cfg: TransformerConfig) -> dict[str, Any]:
    """The `transformer` section that describes a config, the inverse of `transformer_config`.

    Raises:
      UserError: a network that the official code does not have.
    """
    if not cfg.audio_video_attention:
        raise UserError("no official transformer is without audio_video_attention")
    if cfg.ff_mult != 4:
        raise UserError(f"ff_mult={cfg.ff_mult}: official transformers have 4")
    section: dict[str, Any] = {"_class_name": "AVTransformer3DModel"} | ASSERTED
    for key, (ours, _) in CONFIG_FIELDS.items():
        value = getattr(cfg, ours)
        section[key] = list(value) if isinstance(value, tuple) else value
    if cfg.caption_channels is None:
        return section | CAPTIONS_BEFORE
    return section | {"caption_channels": cfg.caption_channels}


# What every released file says; the rest of a guessed section follows from names and shapes.
_RELEASED = {
    "frequencies_precision": "float64",
    "av_ca_timestep_scale_multiplier": 1000,
    "connector_positional_embedding_max_pos": [4096],
}
_CONNECTORS_2_3 = {
    "connector_num_layers": 8,
    "connector_num_attention_heads": 32,
    "connector_attention_head_dim": 128,
    "audio_connector_attention_head_dim": 64,
    "connector_apply_gated_attention": True,
}


def guessed_section(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """The `transformer` section for a file without config, from its tensors.

    What is not in the tensors (rotary positions, the number of heads without gates) is that of the
    released models.

    Args:
      shapes: official name, prefix removed -> shape.

    Raises:
      UserError: tensors that every transformer of LTX-2 has are missing.
    """
    first = "transformer_blocks.0."
    needed = ("patchify_proj.weight", "audio_patchify_proj.weight", f"{first}attn2.to_k.weight",
              f"{first}audio_attn2.to_k.weight")  # fmt: skip
    if missing := [name for name in needed if name not in shapes]:
        raise UserError(f"transformer without config and without {', '.join(missing)}")
    blocks = {int(n.split(".")[1]) for n in shapes if n.startswith("transformer_blocks.")}
    gates = shapes.get(f"{first}attn1.to_gate_logits.weight")
    heads = gates[0] if gates else 32
    (width, channels), (audio_width, audio_channels) = (shapes[name] for name in needed[:2])
    section: dict[str, Any] = _RELEASED | {
        "num_layers": max(blocks) + 1,
        "num_attention_heads": heads,
        "audio_num_attention_heads": heads,
        "attention_head_dim": width // heads,
        "audio_attention_head_dim": audio_width // heads,
        "in_channels": channels,
        "out_channels": channels,
        "audio_in_channels": audio_channels,
        "audio_out_channels": audio_channels,
        "cross_attention_dim": shapes[needed[2]][1],
        "audio_cross_attention_dim": shapes[needed[3]][1],
        "apply_gated_attention": gates is not None,
        "cross_attention_adaln": f"{first}prompt_scale_shift_table" in shapes,
        "use_prompt_adaln_single": "prompt_adaln_single.linear.weight" in shapes,
        "ff_bias": f"{first}ff.net.2.bias" in shapes,
        "audio_ff_bias": f"{first}audio_ff.net.2.bias" in shapes,
        "use_keyframes_abs_pos_embedding": KEYFRAME in shapes,
    }
    caption = shapes.get("caption_projection.linear_1.weight")
    if caption is None:
        return section | _CONNECTORS_2_3 | CAPTIONS_BEFORE
    return section | {"caption_channels": caption[1]}
