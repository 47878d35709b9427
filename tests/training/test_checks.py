"""What is refused before any long work starts."""

from pathlib import Path

import numpy as np
import pytest
from resume_config import get_config

from ltx2_jax.data.schema import Field, Schema
from ltx2_jax.errors import UserError
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
