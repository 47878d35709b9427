"""Gemma weights: every layout gives the same decoder, and what does not fit is said in one line."""

import json
import operator
import re
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from ltx2_jax.errors import UserError
from ltx2_jax.models.text.gemma import GEMMA_3_12B, GEMMA_4_12B
from ltx2_jax.models.text.gemma_layers import LayerKind
from ltx2_jax.sharding import bytes_per_chip
from ltx2_jax.weights.names.gemma import gemma_config, stored_dtype
from ltx2_jax.weights.sources import open_release

GOLDEN = Path(__file__).parents[1] / "golden"
FOLDERS = [GOLDEN / "v2.0" / "gemma", GOLDEN / "v2.5" / "gemma"]
PACKED = GOLDEN / "v2.5" / "split" / "text_encoder.safetensors"
LM = "language_model.model."


def load_gemma(path, mesh=None, dtype="bfloat16"):
    with open_release(path) as release:
        return release.module("gemma", mesh, param_dtype=stored_dtype(dtype), dtype=dtype)


def read_config(path):
    with open_release(path) as release:
        return release.section("gemma")


def params(model):
    leaves = jax.tree_util.tree_flatten_with_path(nnx.state(model, nnx.Param))[0]
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}


def assert_same(a, b):
    a, b = params(a), params(b)
    assert set(a) == set(b)
    for name, value in a.items():
        assert value.dtype == b[name].dtype
        np.testing.assert_array_equal(value, b[name], err_msg=name)


@pytest.fixture
def folder(tmp_path):
    """A copy of the 2.0 folder, with its tensors."""
    copy = tmp_path / "gemma"
    shutil.copytree(FOLDERS[0], copy)
    return copy, load_file(copy / "model.safetensors")


# --------------------------------------------------------------------------------------- layouts


OURS = {
    "input_layernorm": "attention_norm.weight",
    "post_attention_layernorm": "attention_out_norm.weight",
    "pre_feedforward_layernorm": "mlp_norm.weight",
    "post_feedforward_layernorm": "mlp_out_norm.weight",
    "self_attn.q_norm": "attention.query_norm.weight",
    "self_attn.k_norm": "attention.key_norm.weight",
    "self_attn.q_proj": "attention.query.weight",
    "self_attn.k_proj": "attention.key.weight",
    "self_attn.v_proj": "attention.value.weight",
    "self_attn.o_proj": "attention.out.weight",
    "mlp.gate_proj": "mlp.gate.weight",
    "mlp.up_proj": "mlp.up.weight",
    "mlp.down_proj": "mlp.down.weight",
    "layer_scalar": "scalar",
}


@pytest.mark.parametrize("path", FOLDERS, ids=["gemma3", "gemma4"])
def test_every_tensor_of_the_language_model_lands_in_its_layer(path):
    model, tensors = load_gemma(path), load_file(path / "model.safetensors")
    layers = [
        (layer, repeat)
        for group in model.groups
        for repeat in range(group.layers[0].mlp.up.weight.shape[0])
        for layer in group.layers
    ]
    seen = 0
    for name, want in tensors.items():
        match = re.search(r"language_model\.(?:model\.)?layers\.(\d+)\.(.*?)(?:\.weight)?$", name)
        if match is None:
            continue
        layer, repeat = layers[int(match[1])]
        got = operator.attrgetter(OURS[match[2]])(layer)[repeat]
        np.testing.assert_array_equal(np.asarray(got), want, err_msg=name)
        seen += 1
    loaded = sum(len(jax.tree.leaves(nnx.state(layer))) for layer, _ in layers)
    assert seen == loaded >= 13 * 4
    for ours, name in (
        (model.embedding, "embed_tokens.weight"),
        (model.norm.weight, ".norm.weight"),
    ):
        (want,) = (v for k, v in tensors.items() if "language_model" in k and k.endswith(name))
        np.testing.assert_array_equal(ours[...], want)


def test_the_packed_file_holds_the_decoder_of_the_folder():
    assert_same(load_gemma(PACKED), load_gemma(FOLDERS[1]))
    assert read_config(PACKED)["gemma_version"] == "gemma4-tiny-a"


@pytest.mark.parametrize("prefix", ["model.", "model.language_model."])
def test_every_prefix_gives_the_same_decoder(folder, prefix):
    path, tensors = folder
    renamed = {name.replace(LM, prefix): value for name, value in tensors.items()}
    renamed["lm_head.weight"] = tensors[f"{LM}embed_tokens.weight"]
    save_file(renamed, path / "model.safetensors")
    config = json.loads((path / "config.json").read_text())
    if prefix == "model.":  # a text-only folder has a text-only config
        config = config["text_config"]
    (path / "config.json").write_text(json.dumps(config))
    assert_same(load_gemma(path), load_gemma(FOLDERS[0]))


def shard(path, tensors, count=3, index=True):
    names = sorted(tensors)
    (path / "model.safetensors").unlink()
    weight_map = {}
    for i in range(count):
        file = f"model-{i + 1:05}-of-{count:05}.safetensors"
        part = {name: tensors[name] for name in names[i::count]}
        save_file(part, path / file)
        weight_map |= dict.fromkeys(part, file)
    if index:
        content = {"metadata": {"total_size": 1}, "weight_map": weight_map}
        (path / "model.safetensors.index.json").write_text(json.dumps(content))


@pytest.mark.parametrize("index", [True, False], ids=["index", "names"])
def test_shards_give_the_same_decoder_and_a_missing_one_is_named(folder, index):
    path, tensors = folder
    shard(path, tensors, index=index)
    assert_same(load_gemma(path), load_gemma(FOLDERS[0]))
    (path / "model-00003-of-00003.safetensors").unlink()
    with pytest.raises(UserError, match=r"missing: model-00003-of-00003\.safetensors"):
        load_gemma(path)


def test_matrices_keep_bfloat16_unless_asked_and_vectors_are_float32():
    for dtype in ("bfloat16", "float32"):
        model = load_gemma(FOLDERS[0], dtype=dtype)
        assert model.cfg.dtype == dtype
        kinds = {leaf.dtype for name, leaf in params(model).items() if "norm" in name}
        assert kinds == {np.dtype("float32")}
        assert model.embedding.dtype == jnp.dtype(dtype)
        assert model.groups[0].layers[0].mlp.up.weight.dtype == jnp.dtype(dtype)


@pytest.mark.parametrize("path", [FOLDERS[0], PACKED], ids=["gemma3", "gemma4"])
@pytest.mark.parametrize("sizes", [(2, 2, 2), (4, 2, 1)], ids=["2x2x2", "4x2x1"])
def test_a_mesh_gets_the_same_weights_in_shards(mesh_context, path, sizes):
    with mesh_context(*sizes):
        mesh = jax.sharding.get_mesh()
    model = load_gemma(path, mesh=mesh)
    assert_same(model, load_gemma(path))
    matrices = [leaf for leaf in jax.tree.leaves(nnx.state(model)) if leaf.size > 1000]
    assert len(matrices) > 10
    assert all(bytes_per_chip(m) <= m.size * m.dtype.itemsize / 4 for m in matrices)


# ------------------------------------------------------------------------------------------ config

# text_config of google/gemma-3-12b-it as published, which leaves out what is a default.
PUBLISHED = {
    "model_type": "gemma3",
    "eos_token_id": [1, 106],
    "text_config": {
        "hidden_size": 3840,
        "intermediate_size": 15360,
        "model_type": "gemma3_text",
        "num_attention_heads": 16,
        "num_hidden_layers": 48,
        "num_key_value_heads": 8,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        "sliding_window": 1024,
    },
}


PUBLISHED_4 = {
    "model_type": "gemma4_unified",
    "text_config": {
        "attention_k_eq_v": True,
        "enable_moe_block": False,
        "final_logit_softcapping": 30.0,
        "global_head_dim": 512,
        "head_dim": 256,
        "hidden_size": 3840,
        "hidden_size_per_layer_input": 0,
        "intermediate_size": 15360,
        "layer_types": 8 * [*5 * ["sliding_attention"], "full_attention"],
        "model_type": "gemma4_unified_text",
        "num_attention_heads": 16,
        "num_global_key_value_heads": 1,
        "num_hidden_layers": 48,
        "num_key_value_heads": 8,
        "rope_parameters": {
            "full_attention": {
                "partial_rotary_factor": 0.25,
                "rope_theta": 1000000.0,
                "rope_type": "proportional",
            },
            "sliding_attention": {"rope_theta": 10000.0, "rope_type": "default"},
        },
        "sliding_window": 1024,
        "tie_word_embeddings": True,
        "use_bidirectional_attention": "vision",
        "vocab_size": 262144,
    },
}


def changed(**changes):
    return PUBLISHED | {"text_config": PUBLISHED["text_config"] | changes}


def test_the_published_12b_configs_are_the_presets():
    assert gemma_config(PUBLISHED_4) == GEMMA_4_12B
    assert gemma_config(PUBLISHED) == GEMMA_3_12B
    nested = {
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    }
    newer = changed(rope_scaling=None, rope_parameters=nested)
    assert gemma_config(newer) == GEMMA_3_12B
    older = changed(rope_theta=1e6, rope_local_base_freq=1e4, sliding_window_pattern=6)
    assert gemma_config(older) == GEMMA_3_12B


def test_gemma_4_has_its_own_rules_and_global_heads():
    cfg = gemma_config(read_config(PACKED))
    assert cfg.layers == ("sliding", "sliding", "full", "full")
    assert (cfg.attention_scale, cfg.norm_offset, cfg.logit_cap) == (1.0, 0.0, 30.0)
    assert cfg.full == LayerKind(
        head_dim=32, kv_heads=1, rope_theta=1e6, rotary_fraction=0.25, keys_are_values=True
    )
    assert cfg.sliding == LayerKind(head_dim=16, kv_heads=1, window=8)
    config = {"model_type": "gemma4_unified", "text_config": {"num_hidden_layers": 8}}
    cfg = gemma_config(config)
    # Five sliding to one full, the last full in any case; keys and values of their own.
    assert cfg.layers == (*5 * ("sliding",), "full", "sliding", "full")
    assert cfg.full == LayerKind(512, 4, 1e6, rotary_fraction=0.25)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "llama"}, "model_type='llama' is not one of gemma3, gemma4"),
        (changed(attn_logit_softcapping=50.0), "attn_logit_softcapping=50.0 (only null)"),
        (changed(use_bidirectional_attention=True), "use_bidirectional_attention=True"),
        (changed(rope_scaling={"rope_type": "yarn"}), "rope_type='yarn' of full_attention"),
        (changed(layer_types=["full_attention"]), "1 layer_types for num_hidden_layers=48"),
        (changed(layer_types=["chunked_attention"] * 48), "'chunked_attention'"),
        (changed(num_key_value_heads=5), "not a multiple of num_key_value_heads"),
        (PUBLISHED | {"tie_word_embeddings": False}, "tie_word_embeddings=False"),
        # What the smaller and the sparse Gemma 4 have; the first is a default of theirs.
        ({"model_type": "gemma4"}, "hidden_size_per_layer_input=256 (only 0)"),
        (
            {
                "model_type": "gemma4_text",
                "hidden_size_per_layer_input": 0,
                "enable_moe_block": True,
                "num_kv_shared_layers": 20,
            },
            "enable_moe_block=True (only False), num_kv_shared_layers=20",
        ),
    ],
)
def test_what_is_not_implemented_is_refused_by_name(config, message):
    with pytest.raises(UserError, match=re.escape(message)) as error:
        gemma_config(config)
    assert "\n" not in str(error.value)


# ----------------------------------------------------------------------------------------- errors


def refused(path):
    with pytest.raises(UserError) as error:
        load_gemma(path)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_all_that_does_not_fit_the_config_is_listed_at_once(folder):
    path, tensors = folder
    tensors[f"{LM}norm.weight"] = tensors[f"{LM}norm.weight"][:-1]
    up = tensors.pop(f"{LM}layers.2.mlp.up_proj.weight")
    tensors[f"{LM}layers.4.mlp.up_proj.weight"] = up
    tensors[f"{LM}layers.0.mlp.up_proj.weight"] = np.zeros(up.shape, np.int8)
    save_file(tensors, path / "model.safetensors")
    message = refused(path)
    for part in (
        "missing layers.2.mlp.up_proj.weight",
        "unknown layers.4.mlp.up_proj.weight",
        "norm.weight has (31,), not (32,)",
        "layers.0.mlp.up_proj.weight is stored as int8",
    ):
        assert part in message


def test_a_config_of_another_size_is_refused(folder):
    path, _ = folder
    config = json.loads((path / "config.json").read_text())
    config["text_config"]["intermediate_size"] = 65
    (path / "config.json").write_text(json.dumps(config))
    assert "layers.{0-3}.mlp.gate_proj.weight has (64, 32), not (65, 32)" in refused(path)


def test_missing_and_broken_files_are_named(folder, tmp_path):
    path, _ = folder
    assert "no such file or folder" in refused(tmp_path / "nowhere")
    assert "neither gemma_config in its metadata" in refused(path / "model.safetensors")
    weights = (path / "model.safetensors").read_bytes()
    (path / "model.safetensors").write_bytes(weights[:-100])
    assert "not a readable safetensors file" in refused(path)
    (path / "model.safetensors").unlink()
    assert "has no model.safetensors" in refused(path)
    (path / "model.safetensors.index.json").write_text("{}")
    assert "has no weight_map" in refused(path)
    (path / "config.json").write_text("{'model_type'")
    assert "not JSON" in refused(path)
    (path / "config.json").unlink()
    assert "has no safetensors files" in refused(path)


def test_a_file_without_a_language_model_is_refused(folder):
    path, tensors = folder
    rest = {name: value for name, value in tensors.items() if not name.startswith(LM)}
    save_file(rest, path / "model.safetensors")
    assert "holds no network of LTX-2" in refused(path)
