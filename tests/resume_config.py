"""A run of seconds, for tests of the train command."""

import dataclasses
import os
import signal

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
from ltx2_jax.training.metrics import MetricsLogger


def signal_after(step: int, name: str) -> None:
    """This process gets a signal once a step is logged: always at the same moment."""
    log = MetricsLogger.log

    def logged(self, at, metrics):
        log(self, at, metrics)
        if at == step:
            os.kill(os.getpid(), signal.Signals[name])

    MetricsLogger.log = logged


def get_config(arg: str | None = None) -> Config:
    """`arg` such as "9,SIGKILL" is what `signal_after` takes."""
    if arg:
        step, name = arg.split(",")
        signal_after(int(step), name)
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
