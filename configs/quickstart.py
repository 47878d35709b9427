"""A small LTX-2 on two CPU cores: from nothing to clips with sound in about six minutes.

    python -m ltx2_jax.train --config=configs/quickstart.py

renders 512 clips of 2 s (balls that bounce, lamps that flash, each event with a sound), fits a
linear codec to them, trains 1.7 M parameters for 1,000 steps, and makes 64 clips from captions of
the same grammar; `preview.png` in the workdir shows four after two minutes, when scenes and sounds
are noisy yet. The wiring is that of LTX-2 2.3; only sizes differ. One video latent is a whole frame
here, which keeps 2 s at 25 video and 52 audio tokens. Captions pass a small Gemma 3 with fixed
random weights, once; the connectors behind it are trained with the rest.

    --config=configs/quickstart.py:ablation

is the same without cross-attention between audio and video: picture and sound then know of each
other only what the caption says, and no longer agree in time.
"""

import dataclasses

from ltx2_jax.config import (
    Condition,
    Config,
    DataConfig,
    FlowConfig,
    OptimConfig,
    SampleConfig,
    StreamConfig,
    TextConfig,
)
from ltx2_jax.demo.config import LinearCodecConfig, RandomEncoderConfig, SyntheticConfig
from ltx2_jax.errors import UserError
from ltx2_jax.models.text.connectors import ConnectorConfig
from ltx2_jax.models.transformer.config import LTX2_3_22B


def get_config(arg: str | None = None) -> Config:
    if arg not in (None, "ablation"):
        raise UserError(f"configs/quickstart.py:{arg}: the only variant is :ablation")
    connector = ConnectorConfig(
        num_layers=1, num_heads=4, gated_attention=True, registers=32, dtype="float32"
    )
    return Config(
        workdir="workdir/quickstart" if arg is None else f"workdir/quickstart-{arg}",
        model=dataclasses.replace(
            LTX2_3_22B,
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
            audio_video_attention=arg is None,
            # Positions as fractions of 4 s and 64 pixels; fewer octaves than 20 s at 2048 need.
            max_pos=(4.0, 64.0, 64.0),
            audio_max_pos=(4.0,),
            rope_theta=100.0,
            dtype="float32",  # CPUs emulate bfloat16
            # Everything would fit, but to stack what the backward pass needs of every block and to
            # fetch it again takes a CPU longer than to compute it twice.
            remat="block",
        ),
        text=TextConfig(
            length=32,
            encoder=RandomEncoderConfig(video_dim=96, audio_dim=64),
            video_connector=dataclasses.replace(connector, head_dim=24),
            audio_connector=dataclasses.replace(connector, head_dim=16),
        ),
        data=DataConfig(
            synthetic=SyntheticConfig(
                num_clips=512, num_frames=25, height=32, width=32, fps=12.0, sample_rate=16000
            ),
            codec=LinearCodecConfig(
                video_strides=(1, 32, 32), video_channels=48, audio_channels=32
            ),
            batch_size=32,
        ),
        flow=FlowConfig(
            # In three of ten samples the first half of the picture is given, in as many that of the
            # sound, and in one of ten both: from these it learns to follow a given stream, and to
            # go on in the rhythm of what came before.
            video=StreamConfig(conditions=(Condition("prefix", 0.3, length=13),)),
            audio=StreamConfig(conditions=(Condition("prefix", 0.3, length=27),)),
            # Sampling denoises both streams together, so most draws share one noise level.
            shared_sigma_prob=0.85,
            # How many events there are, and when, is decided at noise levels above 0.85
            # (docs/finetuning.md). The shift of 25 tokens puts one draw in eight there, this one
            # three in ten.
            sigma_tokens=3072,
            sigma_uniform_prob=0.2,
            caption_dropout=0.1,
        ),
        optim=OptimConfig(
            optimizer="muon",
            learning_rate=6e-3,
            warmup_steps=50,
            schedule="cosine",
            final_fraction=0.05,
            b2=0.99,
            ema_decay=0.99,
        ),
        sample=SampleConfig(
            num_clips=64,
            batch_size=4,  # as many as the preview shows: one compiled sampler serves both
            steps=30,
            video_guidance=1.0,
            audio_guidance=1.0,
            preview_step=100,
        ),
        num_steps=1000,
    )
