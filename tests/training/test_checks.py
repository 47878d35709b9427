"""What is refused before any long work starts."""

from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest
from resume_config import get_config

from ltx2_jax.config import CheckConfig, Condition, FlowConfig, StreamConfig
from ltx2_jax.data.schema import Field, Schema
from ltx2_jax.errors import UserError
from ltx2_jax.sharding import make_mesh
from ltx2_jax.training import checks


def test_records_of_odd_size_are_refused_before_the_training_that_ends_in_an_mp4():
    fields = {"video": np.zeros((5, 3, 2, 8)), "audio": np.zeros((11, 1, 8))}
    schema = Schema(
        **dict.fromkeys(("release", "text", "text_release", "codec", "codec_hash"), ""),
        **dict.fromkeys(("text_encoder", "text_encoder_hash"), ""),
        **{"num_frames": 9, "height": 33, "width": 16, "fps": 8.0},
        fields={name: Field.of(value) for name, value in fields.items()},
    )
    with pytest.raises(UserError, match=r"a/set: .* even sizes; height 33 x width 16 is not"):
        checks.check_schema(get_config(), schema, Path("a/set"))


def test_a_run_that_is_lost_says_which_checkpoint_to_remove_if_that_is_at_fault():
    def check(step, **values):
        good = {"loss": 1.0, "grad_norm": 1.0, "video_loss_quarters_1": float("nan")}
        checks.check_finite(good | values, step, 40, Path("run/checkpoints"))

    check(41)
    with pytest.raises(UserError, match=r"loss is nan at step 41, .* remove run/checkpoints/40, "):
        check(41, loss=float("nan"))
    with pytest.raises(UserError, match=r"grad_norm is inf at step 42: lower optim.learning_rate"):
        check(42, grad_norm=float("inf"))


def test_the_checker_of_a_tpu_is_refused_where_there_is_none():
    config = replace(get_config(), check=CheckConfig(sdc_every=100))
    with pytest.raises(UserError, match=r"^check\.sdc_every: .* no TPU is here$"):
        checks.check_alone(config, make_mesh(devices=jax.devices()[:1]))


def schema_of(**shapes):
    """A dataset of clips of 9 frames, 32 rows and 32 columns with fields of these shapes."""
    text = {"video_text": (16, 24), "audio_text": (16, 16), "text_mask": (16,)}
    fields = {name: Field("float32", shape) for name, shape in (shapes | text).items()}
    return Schema(
        **dict.fromkeys(("codec", "codec_hash", "text_encoder", "text_encoder_hash"), ""),
        **{"release": "linear", "text": "features", "text_release": "random"},
        **{"num_frames": 9, "height": 32, "width": 32, "fps": 8.0},
        fields=fields,
    )


VIDEO, AUDIO = {"video": (5, 4, 4, 8)}, {"audio": (11, 1, 8)}
REFERENCE = StreamConfig(conditions=(Condition("reference"),))


def of_streams(*streams):
    return replace(get_config(), flow=FlowConfig(*streams))


def test_a_dataset_needs_the_streams_that_a_mode_runs_and_no_other():
    alone = of_streams(StreamConfig("absent"), StreamConfig())
    checks.check_schema(alone, schema_of(**AUDIO), Path("a/set"))
    with pytest.raises(UserError, match=r"a/set: flow.video.role=generated: there is no video"):
        checks.check_schema(get_config(), schema_of(**AUDIO), Path("a/set"))
    with pytest.raises(UserError, match=r"latents have 8 audio channels, but model.audio_in"):
        checks.check_schema(
            replace(alone, model=replace(alone.model, audio_in_channels=9)),
            schema_of(**AUDIO),
            Path("a/set"),
        )


def test_references_of_all_sizes_of_a_dataset_are_looked_at():
    run = of_streams(REFERENCE)
    first = schema_of(**VIDEO, **AUDIO, video_reference=(5, 2, 2, 8))
    checks.check_schema(run, first, Path("a/set"))
    other = schema_of(**VIDEO, **AUDIO, video_reference=(5, 4, 4, 8)).buckets
    with pytest.raises(UserError, match=r"several factors \(space, time\), \[\(1, 1\), \(2, 1\)\]"):
        checks.check_schema(run, replace(first, others=other), Path("a/set"))
    other = schema_of(**VIDEO, **AUDIO).buckets
    with pytest.raises(UserError, match="no field 'video_reference' in its records"):
        checks.check_schema(run, replace(first, others=other), Path("a/set"))
