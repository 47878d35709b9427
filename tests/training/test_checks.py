"""What is refused before any long work starts."""

from pathlib import Path

import jax
import numpy as np
import pytest
from resume_config import get_config

from ltx2_jax.data.schema import Field, Schema
from ltx2_jax.errors import UserError
from ltx2_jax.sharding import make_mesh, sharding_of
from ltx2_jax.training import checks


class Sharding:
    """Of a batch over several hosts, as one of them sees it: the slices of its devices."""

    def __init__(self, *spans):
        self.spans = spans

    def addressable_devices_indices_map(self, shape):
        return {device: (slice(*span),) for device, span in enumerate(self.spans)}


def test_replicas_of_a_shard_on_several_hosts_load_the_same_part():
    assert checks.part_of_batch(Sharding((4, 6), (6, 8)), 8) == (1, 2)
    assert checks.part_of_batch(Sharding((4, 8), (4, 8)), 8) == (1, 2)
    assert checks.part_of_batch(Sharding((None,), (None,)), 8) == (0, 1)


def test_one_host_loads_the_whole_batch_whatever_the_mesh():
    for mesh in (make_mesh(), make_mesh(2, 2, 2), make_mesh(devices=jax.devices()[:1])):
        assert checks.part_of_batch(sharding_of(mesh, "batch"), 8) == (0, 1)


@pytest.mark.parametrize("spans", [[(0, 1), (2, 3)], [(1, 3)], [(0, 3)]])
def test_rows_that_are_not_an_equal_block_of_the_batch_are_refused(spans):
    with pytest.raises(UserError, match=r"hold rows .* of the batch of 8, .* not one block"):
        checks.part_of_batch(Sharding(*spans), 8)


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
