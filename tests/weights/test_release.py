"""Released files of any layout: every tensor has one place in our trees, on any mesh, and back."""

import dataclasses
import json
import re
import warnings
from functools import cache, partial
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
from golden_case import tensors_of
from safetensors.numpy import load_file, save_file

from ltx2_jax.errors import UserError
from ltx2_jax.models.transformer.config import PRESETS
from ltx2_jax.sharding import make_mesh, spec_of
from ltx2_jax.weights import export, mapping, report, versions
from ltx2_jax.weights.names import transformer
from ltx2_jax.weights.names.transformer import guessed_section, section_of, transformer_config
from ltx2_jax.weights.networks import NETWORKS
from ltx2_jax.weights.sources import open_release
from ltx2_jax.weights.tensor_files import TensorFile

GOLDEN = Path(__file__).parents[1] / "golden"
NO_RELEASE = ("io.safetensors", "lora.safetensors")
FILES = sorted(p for p in GOLDEN.rglob("*.safetensors") if p.name not in NO_RELEASE)
CHECKPOINT = GOLDEN / "v2.3" / "checkpoint.safetensors"
PACK = [GOLDEN / "v2.5" / "split" / f"{name}.safetensors" for name in (
    "transformer", "text_encoder", "video_vae_conv", "audio_vae", "duration_head")]  # fmt: skip
DIT = "model.diffusion_model."

# All tensors of the golden files that nothing reads: the written list of them.
UNREAD = {
    "vae.per_channel_statistics.channel",
    "vae.per_channel_statistics.mean-of-stds",
    "vae.per_channel_statistics.mean-of-stds_over_std-of-means",
    "vocoder.mel_stft.stft_fn.inverse_basis",
    "decoder.coarse_head.weight",
}

files = pytest.mark.parametrize(
    "path", FILES, ids=lambda p: str(p.relative_to(GOLDEN)).removesuffix(".safetensors")
)


def opened(path):
    """The file, or the folder of a Hugging Face model."""
    return open_release(path.parent if path.parent.name == "gemma" else path)


def metadata_of(path):
    with TensorFile(path) as file:
        return file.metadata


def written(path, tensors, metadata=None):
    save_file({k: np.ascontiguousarray(v) for k, v in tensors.items()}, path, metadata)
    return path


def fits(*paths):
    with open_release(*paths) as release:
        for network in release.networks:
            release.parameters(network, release.config(network))


def refused(*paths):
    with pytest.raises(UserError) as error:
        fits(*paths)
    assert "\n" not in str(error.value)
    return str(error.value)


# ---- every file ----------------------------------------------------------------------------------


@files
def test_every_tensor_is_mapped_or_on_the_list_of_what_nothing_reads(path):
    with opened(path) as release:
        read, unread = set(), set()
        for network, held in release.networks.items():
            wanted = release.parameters(network, release.config(network))
            names = {name for parameter in wanted for name in parameter.names}
            assert names == set(held.tensors)
            read.update(source.name for source in held.tensors.values())
            unread.update(source.name for source in held.unread.values())
        assert unread <= UNREAD
        beside = {name.split(".")[0] for name in release.beside}
        assert beside <= {
            "multi_modal_projector", "vision_tower", "vision_model", "audio_projector", "model",
            "hf_asset__processor_config", "hf_asset__special_tokens_map",
            "hf_asset__tokenizer_config", "tokenizer_json",
        }  # fmt: skip
        assert read | unread | set(release.beside) == set(release.files[0].tensors)


@files
def test_a_file_comes_back_byte_for_byte_through_the_devices(path, tmp_path):
    with opened(path) as release:
        out = export.of_release(release)
        assert set(out.streams) == set(release.networks)
        out.write(tmp_path / "back.safetensors")
    if path.parent.name == "gemma":  # its config comes from a file beside it
        a, b = (load_file(p) for p in (path, tmp_path / "back.safetensors"))
        assert {k: v.tobytes() for k, v in a.items()} == {k: v.tobytes() for k, v in b.items()}
    else:
        assert (tmp_path / "back.safetensors").read_bytes() == path.read_bytes()


@files
def test_one_device_and_eight_give_the_same(path, monkeypatch):
    from ltx2_jax.weights import loading as placing

    monkeypatch.setattr(placing, "WHOLE_BYTES", 64)  # so that small tensors are shared out too
    mesh = make_mesh(2, 2, 2)
    with opened(path) as release:
        for network in release.networks:
            _, one = release.load(network)
            _, eight = release.load(network, mesh)
            one, eight = mapping.leaves(one), mapping.leaves(eight)
            assert set(one) == set(eight)
            for name, value in one.items():
                assert value.dtype == eight[name].dtype
                assert len(eight[name].sharding.device_set) == 8
                assert np.asarray(value).tobytes() == np.asarray(eight[name]).tobytes(), name


def test_a_mesh_splits_the_weights_as_the_network_says():
    with open_release(CHECKPOINT) as release:
        _, params = release.load("transformer", make_mesh(2, 2, 2))
    to_q = params["blocks"]["video_self"]["to_q"]["weight"]  # [L, out, in]
    assert spec_of(to_q) == jax.P(None, "model", ("data", "sequence"))
    assert to_q.sharding.mesh.axis_types[0] == jax.sharding.AxisType.Explicit


@pytest.mark.parametrize(
    ("sizes", "networks"),
    [((8, 1, 1), ("connectors", "text_projection")), ((1, 2, 4), ("transformer",))],
)
def test_sharded_weights_are_written_as_they_were(sizes, networks, tmp_path):
    mesh = make_mesh(*sizes)
    with open_release(CHECKPOINT) as release:
        out = export.of_release(release)
        for network in networks:
            wanted = release.parameters(network, release.config(network), mesh)
            out.streams[network] = partial(release.stream, network, wanted)
        out.write(tmp_path / "back.safetensors")
    assert (tmp_path / "back.safetensors").read_bytes() == CHECKPOINT.read_bytes()


# ---- layouts -------------------------------------------------------------------------------------


@cache
def union(folder):
    """The single-file checkpoint of 2.5: the split files with `vae.` before the bare names."""
    tensors, metadata, config = {}, {}, {}
    for path in PACK:
        prefix = "vae." if "video_vae" in path.name else ""
        tensors |= {prefix + name: value for name, value in load_file(path).items()}
        metadata |= metadata_of(path)
        # The duration head's file has a part of the transformer's section.
        config = json.loads(metadata_of(path).get("config", "{}")) | config
    return written(folder / "union.safetensors", tensors, metadata | {"config": json.dumps(config)})


def test_a_single_file_of_2_5_loads_as_the_split_pack_does(tmp_path):
    with open_release(union(tmp_path)) as one, open_release(*PACK) as pack:
        assert set(one.networks) == set(pack.networks) >= {"transformer", "gemma", "vocoder"}
        assert one.release_of() == pack.release_of() == "2.5"
        for network in one.networks:
            a, b = one.load(network), pack.load(network)
            assert a[0] == b[0]
            same = jax.tree.map(lambda x, y: np.asarray(x).tobytes() == np.asarray(y).tobytes(),
                                a[1], b[1])  # fmt: skip
            assert jax.tree.all(same), network


def test_a_pack_becomes_a_single_file(tmp_path):
    with open_release(*PACK) as pack:
        export.of_release(pack).write(tmp_path / "one.safetensors")
    mine, theirs = load_file(tmp_path / "one.safetensors"), load_file(union(tmp_path))
    assert {k: v.tobytes() for k, v in mine.items()} == {k: v.tobytes() for k, v in theirs.items()}
    got, want = metadata_of(tmp_path / "one.safetensors"), metadata_of(union(tmp_path))
    assert json.loads(got.pop("config")) == json.loads(want.pop("config"))
    assert got == want


def test_a_folder_is_all_of_its_files(tmp_path):
    for path in PACK[:2]:
        (tmp_path / path.name).write_bytes(path.read_bytes())
    with open_release(tmp_path) as release:
        assert set(release.networks) == {"transformer", "connectors", "gemma", "text_projection"}
    # What macOS writes beside a file of another disk is none.
    (tmp_path / "._transformer.safetensors").write_bytes(b"\0\5\x16\7")
    fits(tmp_path)
    (tmp_path / "again.safetensors").write_bytes(PACK[0].read_bytes())
    message = "holds several models: again.safetensors, transformer.safetensors each have"
    assert message in refused(tmp_path)
    both = refused(tmp_path / "again.safetensors", PACK[0])
    assert "holds a transformer, and so does" in both.replace("connectors", "transformer")
    (tmp_path / "empty").mkdir()
    assert "has no safetensors files" in refused(tmp_path / "empty")


@pytest.mark.parametrize(
    "path",
    [GOLDEN / "v2.0" / "checkpoint.safetensors", CHECKPOINT, PACK[0]],
    ids=["2.0", "2.3", "2.5"],
)
@pytest.mark.parametrize("prefix", ["", "diffusion_model."])
def test_a_fine_tune_without_prefix_and_metadata_gets_both(path, prefix, tmp_path):
    tensors = {k: v for k, v in load_file(path).items() if k.startswith(DIT)}
    tensors = {k: v for k, v in tensors.items() if "embeddings_connector" not in k}
    if path.parts[-2] == "v2.0":  # no gates tell its number of heads: only released widths do
        with open_release(path) as release:
            config = release.config("transformer")
        heads = {"num_heads": 32, "audio_num_heads": 32, "head_dim": 2, "audio_head_dim": 2}
        wanted = dataclasses.replace(config, **heads)
        params = mapping.parameters(partial(transformer.create, wanted), transformer.TABLE)
        tensors = {DIT + n: np.zeros(p.official_shape, np.float32) for p in params for n in p.names}
    bare = {prefix + name.removeprefix(DIT): value for name, value in tensors.items()}
    name = {"v2.0": "2.0", "v2.3": "2.3"}.get(path.parts[-2], "2.5")
    with open_release(written(tmp_path / "bare.safetensors", bare)) as release:
        with pytest.warns(UserWarning, match=f"has no config; .* it is taken for LTX-2 {name}"):
            assert release.release_of() == name
        export.of_release(release, raw=release.networks).write(tmp_path / "full.safetensors")
    full = load_file(tmp_path / "full.safetensors")
    assert {k: v.tobytes() for k, v in full.items()} == {k: v.tobytes() for k, v in tensors.items()}
    assert metadata_of(tmp_path / "full.safetensors")["model_version"] == f"{name}.0"
    with open_release(tmp_path / "full.safetensors") as release:  # and now it says what it is
        release.load("transformer")


def sharded(folder, tensors):
    """Files of few tensors each, as trainers save them, and their index."""
    names, weight_map = sorted(tensors), {}
    for i in range(1, 7):
        file = f"model-0000{i}-of-00006.safetensors"
        part = names[(i - 1) * len(names) // 6 : i * len(names) // 6]
        written(folder / file, {name: tensors[name] for name in part})
        weight_map |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def test_shards_of_a_fine_tune_without_prefix_are_one_transformer(tmp_path):
    with open_release(CHECKPOINT) as release:
        held = release.networks["transformer"].tensors | release.networks["connectors"].tensors
        tensors = {name: source.file.read(source.name) for name, source in held.items()}
    sharded(tmp_path, tensors)
    with open_release(tmp_path) as release, open_release(CHECKPOINT) as base:
        assert set(release.networks) == {"transformer", "connectors"}
        release.describe_by(base)
        for network in release.networks:
            release.parameters(network, release.config(network))


@pytest.mark.parametrize("index", [True, False])
def test_shards_that_are_missing_are_named(index, tmp_path):
    sharded(tmp_path, load_file(CHECKPOINT))
    (tmp_path / "model-00002-of-00006.safetensors").unlink()
    if not index:
        (tmp_path / "model.safetensors.index.json").unlink()
    assert "shards are missing: model-00002-of-00006.safetensors" in refused(tmp_path)


@pytest.mark.parametrize("name", PRESETS)
def test_a_guess_from_released_shapes_is_the_preset(name):
    cfg = PRESETS[name]
    params = mapping.parameters(partial(transformer.create, cfg), transformer.TABLE)
    shapes = {n: p.official_shape for p in params for n in p.names}
    assert len(shapes) == sum(len(p.names) for p in params) > 48 * 40  # names are distinct
    assert transformer_config(guessed_section(shapes)) == cfg
    assert transformer_config(section_of(cfg)) == cfg
    assert versions.release_of_config(section_of(cfg)) == name


# ---- dtypes --------------------------------------------------------------------------------------


def eighth(tensors, module, suffix=".weight_scale", rows=False):
    """Tensors with a matrix in float8 and its scale; and what the matrix then is, in float32."""
    weight = tensors[f"{module}.weight"].astype(np.float32)
    scale = np.abs(weight).max(axis=1 if rows else None) / 448
    scale = np.asarray(scale, np.float32)
    small = (weight / scale.reshape(-1, 1)).astype(ml_dtypes.float8_e4m3fn)
    tensors = tensors | {f"{module}.weight": small, f"{module}{suffix}": scale}
    return tensors, small.astype(np.float32) * scale.reshape(-1, 1)


@pytest.mark.parametrize(
    ("suffix", "rows"),
    [(".weight_scale", False), (".scale_weight", False), (".weight_scale", True)],
)
def test_float8_is_scaled_up_block_by_block(suffix, rows, tmp_path):
    modules = [f"{DIT}transformer_blocks.{i}.attn1.to_q" for i in (0, 2)]
    tensors, wanted = load_file(CHECKPOINT), {}
    for module in modules:  # the block between them stays bfloat16, as in released files
        tensors, wanted[module] = eighth(tensors, module, suffix, rows)
        tensors[f"{module}.input_scale"] = np.float32(1).reshape(())
    tensors["scaled_fp8"] = np.zeros(2, ml_dtypes.float8_e4m3fn)
    tensors[f"{DIT}scaled_fp8"] = tensors.pop("scaled_fp8")
    metadata = metadata_of(CHECKPOINT) | {"_quantization_metadata": '{"layers": {}}'}
    path = written(tmp_path / "fp8.safetensors", tensors, metadata)
    before = tensors_of(CHECKPOINT, "transformer")["transformer_blocks.1.attn1.to_q.weight"]
    for where, dtype in ((None, None), (make_mesh(2, 2, 2), "float32")):
        with open_release(path) as release:
            _, params = release.load("transformer", where, param_dtype=dtype)
        to_q = params["blocks"]["video_self"]["to_q"]["weight"]
        assert to_q.dtype == (dtype or ml_dtypes.bfloat16)
        for i, module in zip((0, 2), modules, strict=True):
            np.testing.assert_array_equal(to_q[i], wanted[module].astype(to_q.dtype))
        np.testing.assert_array_equal(to_q[1], before.astype(to_q.dtype))
    with open_release(path) as release:  # through the devices it becomes a plain bfloat16 file
        export.of_release(release).write(tmp_path / "bf16.safetensors")
    out = load_file(tmp_path / "bf16.safetensors")
    assert set(out) == set(load_file(CHECKPOINT))
    assert metadata_of(tmp_path / "bf16.safetensors") == metadata_of(CHECKPOINT)
    name = f"{modules[0]}.weight"
    np.testing.assert_array_equal(out[name], wanted[modules[0]].astype(ml_dtypes.bfloat16))


def test_a_stack_has_the_finest_dtype_of_its_blocks_and_float64_is_float32(tmp_path):
    tensors = load_file(CHECKPOINT)
    name = f"{DIT}transformer_blocks.{{}}.{{}}.to_q.weight"
    fine = np.random.default_rng(0).normal(size=tensors[name.format(1, "attn1")].shape)
    tensors[name.format(1, "attn1")] = fine.astype(np.float32)
    tensors |= {name.format(i, "attn2"): fine + i for i in range(3)}
    with open_release(written(tmp_path / "x.safetensors", tensors, metadata_of(CHECKPOINT))) as r:
        _, params = r.load("transformer")
    mixed, wide = (
        params["blocks"][kind]["to_q"]["weight"] for kind in ("video_self", "video_text")
    )
    assert mixed.dtype == wide.dtype == np.float32
    np.testing.assert_array_equal(mixed[1], fine.astype(np.float32))
    np.testing.assert_array_equal(mixed[0], tensors[name.format(0, "attn1")].astype(np.float32))
    np.testing.assert_array_equal(wide[2], (fine + 2).astype(np.float32))


def test_float8_without_a_scale_is_cast(tmp_path):
    tensors, name = load_file(CHECKPOINT), f"{DIT}transformer_blocks.1.attn2.to_v.weight"
    tensors[name] = tensors[name].astype(np.float32).astype(ml_dtypes.float8_e5m2)
    with open_release(written(tmp_path / "x.safetensors", tensors, metadata_of(CHECKPOINT))) as r:
        _, params = r.load("transformer")
    got = params["blocks"]["video_text"]["to_v"]["weight"]
    np.testing.assert_array_equal(got[1], tensors[name].astype(got.dtype))


def test_training_takes_float32_copies_and_sampling_what_is_stored():
    with open_release(CHECKPOINT) as release:
        stored, copies = (
            release.load("transformer", param_dtype=dtype)[1] for dtype in (None, "float32")
        )
    kinds = [{leaf.dtype for leaf in jax.tree.leaves(tree)} for tree in (stored, copies)]
    assert kinds[0] == {np.dtype(ml_dtypes.bfloat16), np.dtype("float32")}
    assert kinds[1] == {np.dtype("float32")}


@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "float16", "float8_e4m3fn"])
def test_weights_that_are_not_finite_are_named(dtype, tmp_path):
    kind = np.dtype(getattr(ml_dtypes, dtype, dtype))
    tensors = load_file(CHECKPOINT)
    bad = [f"{DIT}transformer_blocks.{i}.audio_ff.net.2.weight" for i in (0, 1)]
    for name in bad:
        tensors[name] = tensors[name].astype(np.float32).astype(kind)
        tensors[name][3, 2] = np.nan
    tensors[f"{DIT}proj_out.bias"][1] = -np.inf
    path = written(tmp_path / "x.safetensors", tensors, metadata_of(CHECKPOINT))
    expected = r"NaN or infinity in proj_out.bias, transformer_blocks.\{0-1\}.audio_ff.net.2.weight"
    with open_release(path) as release, pytest.warns(UserWarning, match=expected):
        release.load("transformer")


def test_the_largest_and_smallest_numbers_are_finite():
    from ltx2_jax.weights.loading import finite

    for dtype in (ml_dtypes.bfloat16, np.float32, np.float16, ml_dtypes.float8_e4m3fn,
                  ml_dtypes.float8_e5m2):  # fmt: skip
        info = ml_dtypes.finfo(dtype)
        assert finite(np.asarray([info.max, info.min, info.tiny, 0, -0.0], dtype))
        assert not finite(np.asarray([1, np.nan], np.float32).astype(dtype))
    assert finite(np.asarray([2**31 - 1], np.int32))


# ---- what does not fit ---------------------------------------------------------------------------


def test_all_that_is_wrong_with_a_file_is_listed_at_once(tmp_path):
    tensors = load_file(CHECKPOINT)
    tensors[f"{DIT}proj_out.bias"] = tensors[f"{DIT}proj_out.bias"][:-1]
    for i in range(3):
        name = f"{DIT}transformer_blocks.{i}.attn1.to_q.weight"
        tensors[name.replace("attn1", "attn3")] = tensors.pop(name)
    tensors[f"{DIT}adaln_single.linear.bias"] = np.zeros(360, np.int8)
    tensors, _ = eighth(tensors, f"{DIT}transformer_blocks.1.attn2.to_q")
    tensors[f"{DIT}transformer_blocks.1.attn2.to_q.weight_scale"] = np.ones((3, 1), np.float32)
    message = refused(written(tmp_path / "x.safetensors", tensors, metadata_of(CHECKPOINT)))
    for part in (
        "x.safetensors: transformer weights do not fit the config",
        "missing transformer_blocks.{0-2}.attn1.to_q.weight",
        "unknown transformer_blocks.{0-2}.attn3.to_q.weight",
        "proj_out.bias has (3,), not (4,)",
        "adaln_single.linear.bias is stored as int8, not as a float",
        "the scale of transformer_blocks.1.attn2.to_q.weight has (3, 1)",
    ):
        assert part in message


def test_an_absent_keyframe_embedding_is_zero(tmp_path):
    tensors = load_file(PACK[0])
    del tensors[f"{DIT}keyframes_abs_pos_embedding"]
    with open_release(
        written(tmp_path / "x.safetensors", tensors, metadata_of(PACK[0]))
    ) as release:
        _, params = release.load("transformer")
    assert params["video"]["keyframe"].shape == (1, 32)
    assert not params["video"]["keyframe"].any()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\n", "`git lfs pull`"),
        (b"\n<!DOCTYPE html><html>log in</html>", "is a web page, not weights: download the file"),
        (b'<?xml version="1.0"?><Error>AccessDenied</Error>', "is a web page, not weights"),
        (b"GGUF" + bytes([3, 0, 0, 0, 9]), "is a GGUF file, which is not read: use a safetensors"),
        (b"PK\x03\x04" + bytes(60), "is a zip archive or a file of torch.save"),
        (b'{"weight_map": {"a": "b"}}', "is text (JSON), not weights: give the safetensors file"),
        (b"", "is empty: download it again"),
        (bytes(4096), "is filled with zeros from its start: the download did not finish"),
        (CHECKPOINT.read_bytes()[:-7], "not a readable safetensors file (truncated: its tensors"),
        # A header whose length begins like text is no text.
        (b"<" + bytes(7) + b"x" * 60, "not a readable safetensors file (its header is not JSON)"),
    ],
)  # fmt: skip
def test_a_file_of_another_kind_is_told_what_it_is_and_what_to_do(content, message, tmp_path):
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    error = refused(path)
    assert error.startswith(f"{path}: ")
    assert message in error


def test_of_a_folder_with_several_models_one_file_is_asked_for(tmp_path):
    names = ("ltx-dev.safetensors", "ltx-distilled.safetensors")
    for name in names:
        (tmp_path / name).write_bytes(CHECKPOINT.read_bytes())
    (tmp_path / "upscaler.safetensors").write_bytes(
        (GOLDEN / "v2.3" / "upsampler_spatial.safetensors").read_bytes()
    )
    (tmp_path / "lora.safetensors").write_bytes((GOLDEN / "v2.3" / "lora.safetensors").read_bytes())
    assert refused(tmp_path) == (
        f"{tmp_path}: holds several models: {', '.join(names)} each have a transformer; in place "
        f"of the folder give one of them, such as {tmp_path / names[0]}"
    )


def test_a_downloaded_repository_with_parts_for_diffusers_is_its_checkpoint(tmp_path):
    (tmp_path / "model_index.json").write_text("{}")
    (tmp_path / "vae").mkdir()
    written(tmp_path / "vae" / "a.safetensors", {"x": np.zeros(2)})
    index = {"weight_map": {"x": "a.safetensors"}}
    (tmp_path / "vae" / "a.safetensors.index.json").write_text(json.dumps(index))
    assert "is a model in the layout of diffusers, which is not read" in refused(tmp_path)
    (tmp_path / "ltx.safetensors").write_bytes(CHECKPOINT.read_bytes())
    fits(tmp_path)


@pytest.mark.parametrize(
    "name", ["pytorch_lora_weights.safetensors", "adapter_model.safetensors", "mine.safetensors"]
)
def test_a_folder_with_a_lora_is_no_model(name, tmp_path):
    (tmp_path / name).write_bytes((GOLDEN / "v2.3" / "lora.safetensors").read_bytes())
    error = refused(tmp_path)
    assert name in error
    assert "not a model; merge it into one: python -m ltx2_jax.convert MODEL.safetensors" in error


def test_a_folder_without_safetensors_files_says_what_it_has(tmp_path):
    (tmp_path / "ltx-q4.gguf").write_bytes(b"GGUF")
    assert "has no safetensors files (but ltx-q4.gguf, which is not read)" in refused(tmp_path)


def test_files_of_something_else_are_told_what_they_are(tmp_path):
    path = tmp_path / "x.safetensors"
    assert "is a LoRA file" in refused(GOLDEN / "v2.3" / "lora.safetensors")
    diffusers = {"time_embed.linear.weight": np.zeros(2), "proj_in.weight": np.zeros(2)}
    diffusers["transformer_blocks.0.attn1.to_q.weight"] = np.zeros(2)
    assert "has the layout of diffusers" in refused(written(path, diffusers))
    path.unlink()
    message = refused(written(path, {"unet.0.weight": np.zeros(2), "unet.1.weight": np.zeros(2)}))
    assert "holds no network of LTX-2 (its tensors are unet.{0-1}.weight" in message
    path.unlink()
    more = load_file(PACK[4]) | {"surprise.weight": np.zeros(2)}
    assert "tensors of no known network: surprise.weight" in refused(
        written(path, more, metadata_of(PACK[4]))
    )


@pytest.mark.parametrize("half", ["encoder", "decoder"])
@pytest.mark.parametrize("network", ["video_vae", "audio_vae"])
def test_half_an_autoencoder_is_read_for_what_it_is(network, half, tmp_path):
    prefix = {"video_vae": "vae.", "audio_vae": "audio_vae."}[network]
    mine = {k: v for k, v in load_file(CHECKPOINT).items() if k.startswith(prefix)}
    tensors = {k: v for k, v in mine.items() if not k.startswith(f"{prefix}{half}.")}
    assert len(tensors) < len(mine)
    path = written(tmp_path / "x.safetensors", tensors, metadata_of(CHECKPOINT))
    with open_release(path) as release, open_release(CHECKPOINT) as whole:
        _, params = release.load(network)
        want = whole.load(network)[1]
        assert set(params) == set(want) - {half}
        jax.tree.map(np.testing.assert_array_equal, params, {k: want[k] for k in params})
        left = {"encoder": "decoder", "decoder": "encoder"}[half]
        line = next(x for x in report.of_release(release).splitlines() if network in x)
        assert line.endswith(f", {left}")
        assert next(x for x in report.of_release(whole).splitlines() if network in x).endswith(
            "encoder and decoder"
        )
    del tensors[next(k for k in tensors if f".{left}.conv_out" in k)]
    path = written(tmp_path / "y.safetensors", tensors, metadata_of(CHECKPOINT))
    assert f"missing {left}.conv_out" in refused(path)  # a half is whole or refused


def test_a_network_that_is_not_there_is_named_beside_those_that_are():
    with open_release(PACK[4]) as release, pytest.raises(UserError) as error:
        release.load("video_vae")
    assert "duration_head.safetensors: has no video vae, only: duration_head" in str(error.value)


def test_metadata_that_is_damaged_or_missing_is_named(tmp_path):
    tensors = load_file(PACK[2])
    for metadata, message in (
        ({"config": "{"}, "config in its metadata is not JSON"),
        ({"config": "[]"}, "config in its metadata is not a JSON object"),
        (
            {"gemma_source_checkpoint": '"a"'},
            "gemma_source_checkpoint in its metadata is not a JSON",
        ),
        ({}, "its metadata has no 'vae' section"),
        ({"config": json.dumps({"audio_vae": {}})}, "its metadata has no 'vae' section"),
    ):
        path = tmp_path / "x.safetensors"
        assert message in refused(written(path, tensors, metadata))
        path.unlink()


@pytest.mark.parametrize(
    ("version", "release"),
    [("2.0.0", "2.0"), ("2.3.rc1", "2.3"), ("2.5-rc2", "2.5"), ("", ""), ("banana", "")],
)
def test_a_release_is_the_first_two_numbers_of_a_version(version, release):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert versions.release_of(version) == release


@pytest.mark.parametrize(
    ("version", "closest"), [("2.7.1", "2.5"), ("3.0", "2.5"), ("2.4-rc2", "2.5"), ("2.1", "2.0")]
)
def test_an_unknown_version_is_the_closest_known_one_with_a_warning(version, closest):
    with pytest.warns(
        UserWarning, match=re.escape(f"model_version={version} is unknown; taken for")
    ):
        assert versions.release_of(version) == closest


@pytest.mark.parametrize(
    ("section", "values", "message"),
    [
        ("transformer", {"num_layers": "3"}, "transformer: num_layers='3' cannot be read"),
        ("transformer", {"rope_type": "x"}, "transformer: rope_type='x' is not one of"),
        ("transformer", {"positional_embedding_max_pos": None}, "_max_pos=None cannot be read"),
        ("transformer", {"audio_num_attention_heads": 4}, "audio_num_heads=4 must equal num_head"),
        ("transformer", {"dropout": 0.1}, "transformer: unsupported transformer config: dropout"),
        ("transformer", {"norm_eps": True}, "transformer: norm_eps=True cannot be read"),
        ("vae", {"decoder_blocks": 3}, "video vae: decoder_blocks=3 cannot be read"),
        ("vae", [], "'vae' in its config is not a JSON object"),
    ],
)
def test_a_config_of_wrong_values_is_one_line_that_names_them(section, values, message, tmp_path):
    metadata = metadata_of(CHECKPOINT)
    config = json.loads(metadata["config"])
    config[section] = config[section] | values if values else values
    metadata["config"] = json.dumps(config)
    path = written(tmp_path / "x.safetensors", load_file(CHECKPOINT), metadata)
    error = refused(path)
    assert error.startswith(f"{path}: ")
    assert message in error


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


def test_networks_without_an_official_form_are_refused_by_name():
    for change, message in (
        ({"audio_video_attention": False}, "without audio_video_attention"),
        ({"ff_mult": 3}, "ff_mult=3: official transformers have 4"),
    ):
        with pytest.raises(UserError, match=message):
            section_of(dataclasses.replace(PRESETS["2.3"], **change))


def test_every_network_has_a_place_in_a_single_file():
    assert set(export.PREFIXES) == set(NETWORKS)
