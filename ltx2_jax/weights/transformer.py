"""The transformer's weights under their official names, and its config in released metadata.

The mapping is data: `RENAMES` gives the official module for each of ours, `key_table` spells out
every tensor. Matrices are stored [in, out] here and [out, in] officially; the blocks are stacked on
a leading axis here and numbered officially.
Source: `ltx_core/model/transformer/model_configurator.py` (config keys, asserted constants).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from flax import nnx

from ltx2_jax.errors import UserError
from ltx2_jax.models.transformer import LTX2Transformer, TransformerConfig

PREFIX = "model.diffusion_model."
# These live under the same prefix but belong to the text connectors.
CONNECTOR_PREFIXES = ("video_embeddings_connector.", "audio_embeddings_connector.")

RENAMES = {
    # outside the blocks
    "video.project_in": "patchify_proj",
    "audio.project_in": "audio_patchify_proj",
    "video.adaln": "adaln_single",
    "audio.adaln": "audio_adaln_single",
    "video.prompt_adaln": "prompt_adaln_single",
    "audio.prompt_adaln": "audio_prompt_adaln_single",
    "video.cross_adaln": "av_ca_video_scale_shift_adaln_single",
    "audio.cross_adaln": "av_ca_audio_scale_shift_adaln_single",
    "video.cross_gate_adaln": "av_ca_a2v_gate_adaln_single",
    "audio.cross_gate_adaln": "av_ca_v2a_gate_adaln_single",
    "video.caption_in": "caption_projection.linear_1",
    "video.caption_out": "caption_projection.linear_2",
    "audio.caption_in": "audio_caption_projection.linear_1",
    "audio.caption_out": "audio_caption_projection.linear_2",
    "video.keyframe": "keyframes_abs_pos_embedding",
    "video.head_table": "scale_shift_table",
    "audio.head_table": "audio_scale_shift_table",
    "video.project_out": "proj_out",
    "audio.project_out": "audio_proj_out",
    # inside a block
    "blocks.video_self": "attn1",
    "blocks.video_text": "attn2",
    "blocks.audio_self": "audio_attn1",
    "blocks.audio_text": "audio_attn2",
    "blocks.audio_to_video": "audio_to_video_attn",
    "blocks.video_to_audio": "video_to_audio_attn",
    "blocks.video_mlp.linear_in": "ff.net.0.proj",
    "blocks.video_mlp.linear_out": "ff.net.2",
    "blocks.audio_mlp.linear_in": "audio_ff.net.0.proj",
    "blocks.audio_mlp.linear_out": "audio_ff.net.2",
    "blocks.video_table": "scale_shift_table",
    "blocks.audio_table": "audio_scale_shift_table",
    "blocks.video_prompt_table": "prompt_scale_shift_table",
    "blocks.audio_prompt_table": "audio_prompt_scale_shift_table",
    "blocks.video_cross_table": "scale_shift_table_a2v_ca_video",
    "blocks.audio_cross_table": "scale_shift_table_a2v_ca_audio",
}

# What follows a renamed module: ours -> official.
LEAVES = {
    "": "",
    "kernel": "weight",
    "bias": "bias",
    "linear_1.kernel": "emb.timestep_embedder.linear_1.weight",
    "linear_1.bias": "emb.timestep_embedder.linear_1.bias",
    "linear_2.kernel": "emb.timestep_embedder.linear_2.weight",
    "linear_2.bias": "emb.timestep_embedder.linear_2.bias",
    "linear.kernel": "linear.weight",
    "linear.bias": "linear.bias",
    "to_q.kernel": "to_q.weight",
    "to_q.bias": "to_q.bias",
    "to_k.kernel": "to_k.weight",
    "to_k.bias": "to_k.bias",
    "to_v.kernel": "to_v.weight",
    "to_v.bias": "to_v.bias",
    "to_out.kernel": "to_out.0.weight",
    "to_out.bias": "to_out.0.bias",
    "to_gate.kernel": "to_gate_logits.weight",
    "to_gate.bias": "to_gate_logits.bias",
    "q_norm": "q_norm.weight",
    "k_norm": "k_norm.weight",
}


@dataclass(frozen=True)
class Key:
    """One of our parameters and where the released files keep it."""

    path: tuple[str, ...]  # in our parameter tree
    official: str  # name after the prefix; "{i}" stands for the block number
    shape: tuple[int, ...]  # ours, with the leading layer axis in the blocks

    @property
    def stacked(self) -> bool:
        return self.path[0] == "blocks"

    @property
    def transposed(self) -> bool:
        return self.path[-1] == "kernel"

    def official_names(self) -> list[str]:
        if not self.stacked:
            return [self.official]
        return [self.official.format(i=i) for i in range(self.shape[0])]

    def official_shape(self) -> tuple[int, ...]:
        shape = self.shape[1:] if self.stacked else self.shape
        return shape[::-1] if self.transposed else shape


def key_table(cfg: TransformerConfig) -> list[Key]:
    """One `Key` for every parameter of the transformer."""
    model = jax.eval_shape(lambda: LTX2Transformer(cfg, rngs=nnx.Rngs(0)))
    params = nnx.to_pure_dict(nnx.split(model, nnx.Param)[1])
    table = []
    for path, leaf in jax.tree_util.tree_flatten_with_path(params)[0]:
        names = tuple(entry.key for entry in path)
        table.append(Key(names, _official_name(names), leaf.shape))
    return table


def _official_name(path: tuple[str, ...]) -> str:
    for cut in range(len(path), 0, -1):
        module = RENAMES.get(".".join(path[:cut]))
        if module is not None:
            leaf = LEAVES[".".join(path[cut:])]
            name = f"{module}.{leaf}" if leaf else module
            return f"transformer_blocks.{{i}}.{name}" if path[0] == "blocks" else name
    raise KeyError(f"no official name for {'.'.join(path)}")


def from_official(tensors: Mapping[str, np.ndarray], cfg: TransformerConfig) -> dict[str, Any]:
    """Official tensors (with or without the prefix) -> our parameter tree of numpy arrays.

    An absent `keyframes_abs_pos_embedding` is zero, as upstream treats it.

    Raises:
      UserError: missing, unknown or misshapen tensors, all of them listed.
    """
    tensors = {name.removeprefix(PREFIX): value for name, value in tensors.items()}
    tensors = {k: v for k, v in tensors.items() if not k.startswith(CONNECTOR_PREFIXES)}
    tree: dict[str, Any] = {}
    problems, known = [], set()
    for key in key_table(cfg):
        parts = []
        for name in key.official_names():
            known.add(name)
            if name not in tensors and key.path[-1] == "keyframe":
                parts.append(np.zeros(key.official_shape(), np.float32))
            elif name not in tensors:
                problems.append(f"missing {name}")
            elif tensors[name].shape != key.official_shape():
                problems.append(f"{name} has {tensors[name].shape}, not {key.official_shape()}")
            else:
                parts.append(tensors[name].T if key.transposed else tensors[name])
        if not problems:
            _insert(tree, key.path, np.stack(parts) if key.stacked else parts[0])
    problems += [f"unknown {name}" for name in tensors if name not in known]
    if problems:
        raise UserError(f"transformer weights do not fit the config: {'; '.join(problems)}")
    return tree


def to_official(params: Mapping[str, Any], cfg: TransformerConfig) -> dict[str, np.ndarray]:
    """Our parameter tree -> official tensors, without prefix; the inverse of `from_official`."""
    tensors = {}
    for key in key_table(cfg):
        value: Any = params
        for name in key.path:
            value = value[name]
        value = np.asarray(value)
        for i, name in enumerate(key.official_names()):
            part = value[i] if key.stacked else value
            tensors[name] = np.ascontiguousarray(part.T if key.transposed else part)
    return tensors


def _insert(tree: dict[str, Any], path: tuple[str, ...], value: np.ndarray) -> None:
    for name in path[:-1]:
        tree = tree.setdefault(name, {})
    tree[path[-1]] = value


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
