"""A run of seconds, for tests of the train command."""

import dataclasses

from ltx2_jax.config import (
    CheckpointConfig,
    Config,
    DataConfig,
    FlowConfig,
    OptimConfig,
    SampleConfig,
    TextConfig,
)
from ltx2_jax.demo.config import LinearCodecConfig, RandomEncoderConfig, SyntheticConfig
from ltx2_jax.models.text.connectors import ConnectorConfig
from ltx2_jax.models.transformer.config import TransformerConfig


def get_config(arg: str | None = None) -> Config:
    connector = ConnectorConfig(num_layers=1, num_heads=2, registers=8, dtype="float32")
    return Config(
        workdir="workdir/resume",
        model=TransformerConfig(
            num_layers=1,
            num_heads=2,
            head_dim=12,
            audio_num_heads=2,
            audio_head_dim=8,
            in_channels=8,
            out_channels=8,
            audio_in_channels=8,
            audio_out_channels=8,
            context_dim=24,
            audio_context_dim=16,
            caption_channels=None,
            rope_theta=100.0,
            dtype="float32",
            remat="none",
        ),
        text=TextConfig(
            length=16,
            encoder=RandomEncoderConfig(video_dim=24, audio_dim=16),
            video_connector=dataclasses.replace(connector, head_dim=12),
            audio_connector=dataclasses.replace(connector, head_dim=8),
        ),
        data=DataConfig(
            synthetic=SyntheticConfig(num_clips=12, num_frames=9, fps=8.0, height=16, width=16),
            codec=LinearCodecConfig(
                video_strides=(2, 8, 8),
                video_channels=8,
                audio_channels=8,
                griffin_lim_iterations=2,
            ),
            batch_size=8,
        ),
        flow=FlowConfig(shared_sigma_prob=0.5, first_frame_prob=0.2, caption_dropout=0.2),
        optim=OptimConfig(learning_rate=1e-3, warmup_steps=2, ema_decay=0.9),
        checkpoint=CheckpointConfig(every_steps=4),
        sample=SampleConfig(num_clips=4, batch_size=4, steps=2),
        num_steps=12,
    )
