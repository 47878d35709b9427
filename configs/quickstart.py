"""Quickstart."""

from ltx2_jax.config import Config, DataConfig, FlowConfig, OptimConfig, SampleConfig
from ltx2_jax.data.synthetic import SyntheticConfig
from ltx2_jax.models.caption_embedding import TextConfig
from ltx2_jax.models.linear_codec import LinearCodecConfig
from ltx2_jax.models.transformer import TransformerConfig


def get_config(arg: str | None = None) -> Config:
    return Config(
        workdir="workdir/quickstart",
        model=TransformerConfig(
            num_layers=4,
            num_heads=4,
            head_dim=24,
            audio_num_heads=4,
            audio_head_dim=16,
            in_channels=48,
            out_channels=48,
            audio_in_channels=32,
            audio_out_channels=32,
            context_dim=96,
            audio_context_dim=64,
            caption_channels=None,
            gated_attention=True,
            modulated_text_attention=True,
            prompt_adaln=True,
            max_pos=(4.0, 64.0, 64.0),
            audio_max_pos=(4.0,),
            rope_theta=100.0,
            dtype="float32",
            remat="none",
        ),
        text=TextConfig(length=32, vocab_size=512, width=64),
        data=DataConfig(
            synthetic=SyntheticConfig(),
            codec=LinearCodecConfig(video_strides=(4, 8, 8), video_channels=48, audio_channels=32),
            batch_size=16,
        ),
        flow=FlowConfig(shared_sigma_prob=0.5, caption_dropout=0.1),
        optim=OptimConfig(
            learning_rate=2e-3,
            warmup_steps=50,
            schedule="cosine",
            final_fraction=0.05,
            ema_decay=0.995,
        ),
        sample=SampleConfig(
            num_clips=64, batch_size=32, steps=20, video_guidance=1.0, audio_guidance=1.0
        ),
        num_steps=1200,
    )
