"""The key table: every released tensor has one place in our tree, and back."""

import json

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file

from ltx2_jax.errors import UserError
from ltx2_jax.models.transformer import PRESETS
from ltx2_jax.weights.transformer import (
    CONNECTOR_PREFIXES,
    PREFIX,
    from_official,
    key_table,
    to_official,
    transformer_config,
)

FILES = ["v2.0/checkpoint.safetensors", "v2.3/checkpoint.safetensors",
         "v2.5/split/transformer.safetensors"]  # fmt: skip


def read(name):
    from pathlib import Path

    path = Path(__file__).parent / "golden" / name
    with safe_open(path, framework="numpy") as file:
        config = json.loads(file.metadata()["config"])["transformer"]
    tensors = {
        key.removeprefix(PREFIX): value
        for key, value in load_file(path).items()
        if key.startswith(PREFIX)
    }
    return config, {k: v for k, v in tensors.items() if not k.startswith(CONNECTOR_PREFIXES)}


@pytest.mark.parametrize("name", FILES)
def test_every_tensor_is_mapped_and_comes_back_bit_for_bit(name):
    config, tensors = read(name)
    cfg = transformer_config(config)
    back = to_official(from_official(tensors, cfg), cfg)
    assert set(back) == set(tensors)
    for key, value in tensors.items():
        assert back[key].dtype == value.dtype
        np.testing.assert_array_equal(
            back[key].view(np.uint8), np.ascontiguousarray(value).view(np.uint8), err_msg=key
        )


def test_all_that_is_wrong_with_a_file_is_listed_at_once():
    config, tensors = read(FILES[1])
    cfg = transformer_config(config)
    tensors["proj_out.bias"] = tensors["proj_out.bias"][:-1]
    tensors["surprise.weight"] = tensors.pop("transformer_blocks.1.attn1.to_q.weight")
    with pytest.raises(UserError) as error:
        from_official(tensors, cfg)
    for part in ("missing transformer_blocks.1.attn1.to_q.weight", "unknown surprise.weight",
                 "proj_out.bias has (3,), not (4,)"):  # fmt: skip
        assert part in str(error.value)


def test_an_absent_keyframe_embedding_is_zero():
    config, tensors = read(FILES[2])
    del tensors["keyframes_abs_pos_embedding"]
    tree = from_official(tensors, transformer_config(config))
    assert not tree["video"]["keyframe"].any()


@pytest.mark.parametrize("preset", PRESETS)
def test_official_names_of_a_preset_are_distinct(preset):
    names = [name for key in key_table(PRESETS[preset]) for name in key.official_names()]
    assert len(names) == len(set(names)) > 48 * 40


def test_released_metadata_gives_the_presets():
    released = {
        "caption_channels": 3840,
        "frequencies_precision": "float64",
        "av_ca_timestep_scale_multiplier": 1000,
    }
    assert transformer_config(released) == PRESETS["2.0"]
    newer = released | {
        "apply_gated_attention": True,
        "cross_attention_adaln": True,
        "caption_proj_before_connector": True,
    }
    assert transformer_config(newer) == PRESETS["2.3"]
    newest = newer | {"ff_bias": False, "use_keyframes_abs_pos_embedding": True}
    assert transformer_config(newest) == PRESETS["2.5"]


def test_an_asserted_constant_of_another_value_is_refused_by_name():
    with pytest.raises(UserError, match="qk_norm='layer_norm'"):
        transformer_config({"qk_norm": "layer_norm"})
