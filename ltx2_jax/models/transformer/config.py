"""Sizes and wiring of the transformer; the released models are values of one config."""

import dataclasses
from dataclasses import dataclass

from ltx2_jax.models.remat import REMAT_POLICIES
from ltx2_jax.models.transformer.attention_kernels import BACKENDS


@dataclass(frozen=True)
class TransformerConfig:
    """Sizes and wiring of one model; the defaults are LTX-2 2.0 (19B)."""

    num_layers: int = 48
    num_heads: int = 32
    head_dim: int = 128
    audio_num_heads: int = 32
    audio_head_dim: int = 64
    in_channels: int = 128
    out_channels: int = 128
    audio_in_channels: int = 128
    audio_out_channels: int = 128
    context_dim: int = 4096  # text width that video attends to
    audio_context_dim: int = 2048  # text width that audio attends to
    caption_channels: int | None = 3840  # text is projected from this width inside (2.0), or None
    gated_attention: bool = False  # a sigmoid gate per head (2.3)
    modulated_text_attention: bool = False  # AdaLN around the text attention (2.3)
    prompt_adaln: bool = False  # text keys and values modulated by sigma as well (2.3)
    ff_bias: bool = True
    audio_ff_bias: bool = True
    keyframe_embedding: bool = False  # a learned mark on given or generated keyframes (2.5)
    audio_video_attention: bool = True  # off only to ablate it
    ff_mult: int = 4
    norm_eps: float = 1e-6
    timestep_scale: float = 1000.0
    cross_gate_timestep_scale: float = 1000.0
    rope_theta: float = 10000.0
    max_pos: tuple[float, float, float] = (20.0, 2048.0, 2048.0)  # seconds, pixels, pixels
    audio_max_pos: tuple[float] = (20.0,)  # seconds
    rope_type: str = "split"  # or "interleaved"
    rope_precision: str = "float64"
    dtype: str = "bfloat16"  # of activations; weights are cast to it where they are used
    remat: str = "attention"  # a key of REMAT_POLICIES
    attention: str = "auto"  # the backend, to debug one: see attention_kernels.py

    def __post_init__(self):
        choices = {
            "remat": tuple(REMAT_POLICIES),
            "attention": BACKENDS,
            "rope_type": ("split", "interleaved"),
            "rope_precision": ("float64", "float32"),
            "dtype": ("bfloat16", "float32"),
        }
        for field, allowed in choices.items():
            if getattr(self, field) not in allowed:
                raise ValueError(f"{field}={getattr(self, field)!r} is not one of {allowed}")
        sizes = ("num_layers", "num_heads", "head_dim", "audio_head_dim", "in_channels",
                 "out_channels", "audio_in_channels", "audio_out_channels", "context_dim",
                 "audio_context_dim", "ff_mult")  # fmt: skip
        for field in sizes:
            # RoPE turns pairs of a head's features.
            even = field.endswith("head_dim")
            if getattr(self, field) < 1 or (even and getattr(self, field) % 2):
                wanted = "an even number above 0" if even else "above 0"
                raise ValueError(f"{field}={getattr(self, field)} must be {wanted}")
        if self.audio_num_heads != self.num_heads:
            raise ValueError(
                f"audio_num_heads={self.audio_num_heads} must equal num_heads={self.num_heads}: "
                "the streams exchange keys head by head"
            )

    @property
    def width(self) -> int:
        return self.num_heads * self.head_dim

    @property
    def audio_width(self) -> int:
        return self.audio_num_heads * self.audio_head_dim

    @property
    def adaln_rows(self) -> int:
        return 9 if self.modulated_text_attention else 6


LTX2_19B = TransformerConfig()
LTX2_3_22B = dataclasses.replace(
    LTX2_19B,
    caption_channels=None,
    gated_attention=True,
    modulated_text_attention=True,
    prompt_adaln=True,
)
LTX2_5_22B = dataclasses.replace(LTX2_3_22B, ff_bias=False, keyframe_embedding=True)
PRESETS = {"2.0": LTX2_19B, "2.3": LTX2_3_22B, "2.5": LTX2_5_22B}
