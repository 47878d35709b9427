"""Quantised models: near the reference, small on the chip, and read from files piece by piece."""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from golden_case import load_cases
from golden_transformer import forward, streams
from safetensors.numpy import load_file, save_file

from ltx2_jax import sample
from ltx2_jax.errors import UserError
from ltx2_jax.media import media
from ltx2_jax.models.quantized import dequantized, quantized
from ltx2_jax.sampling import pipeline
from ltx2_jax.sampling.loading import Files, Weights
from ltx2_jax.sampling.loras import Strength
from ltx2_jax.sampling.pipeline import Pipeline
from ltx2_jax.sharding import make_mesh
from ltx2_jax.text.encoder import TextEncoder
from ltx2_jax.weights import loading, mapping
from ltx2_jax.weights.sources import open_release

V20, V23 = (Path(__file__).parents[1] / "golden" / name for name in ("v2.0", "v2.3"))


def files(folder=V23, checkpoint="checkpoint.safetensors"):
    return Files.open([folder / checkpoint], folder / "gemma", None, None)


def weights(form, found=None, mesh=None, **how):
    found = found or files()
    config = dataclasses.replace(found.networks("float32"), quantized=form)
    return Weights(found.release, config, mesh or make_mesh(devices=jax.devices()[:1]), **how)


def velocities(held, case, loras=()):
    """Of both streams, by the transformer alone."""
    params = held.params(loras)
    model = nnx.merge(held.graph(loras), params).transformer
    return forward(*nnx.split(model), *streams(case.inputs()), None)


def relative(got, want):
    return np.linalg.norm(np.asarray(got) - want) / np.linalg.norm(want)


@pytest.fixture(scope="module")
def case():
    return next(
        c for c in load_cases(V23.parent) if (c.folder, c.name) == (V23, "transformer/av_uniform")
    )


# Of random weights, on which roundings act as independent noise: what three blocks make of half a
# step, uniform in it. Trained weights are no worse conditioned.
@pytest.mark.parametrize(
    ("form", "least", "most"),
    [
        ("int8", 5e-4, 0.02),
        ("fp8", 2e-3, 0.08),
        ("int4", 0.02, 0.3),
        ("int8-products", 5e-4, 0.03),
        ("fp8-products", 2e-3, 0.12),
    ],
)
def test_velocities_stay_near_the_reference(form, least, most, case):
    v, a = velocities(weights(form), case)
    for got, name in ((v, "v_velocity"), (a, "a_velocity")):
        error = relative(got, case.expected()[name])
        print(f"{form} {name}: relative error {error:.2%}")
        assert least < error < most


def connectors(form):
    return mapping.leaves(weights(form).connectors()[1])


def test_a_matrix_is_what_the_files_say_rounded_once(monkeypatch):
    """Read whole, or layer by layer as for a chip; norms, registers and gates are as before."""
    plain, whole = connectors(None), connectors("int4")
    monkeypatch.setattr(loading, "_platform", lambda sharding: "tpu")
    monkeypatch.setattr(loading, "PIECE_BYTES", 1)
    pieces = connectors("int4")
    matrices = {path for path in whole if (*path[:-1], "scale") in whole and path[-1] == "weight"}
    assert len(matrices) == 2 * 6  # attention and feed-forward of both streams
    assert set(whole) == {*plain, *((*path[:-1], "scale") for path in matrices)}
    for path, value in plain.items():
        want = {path: value}
        if path in matrices:
            scale = (*path[:-1], "scale")
            want = dict(zip((path, scale), quantized(value, "int4"), strict=True))
        for name, expected in want.items():
            assert whole[name].dtype == pieces[name].dtype == expected.dtype
            np.testing.assert_array_equal(whole[name], expected)
            np.testing.assert_array_equal(pieces[name], expected)


@pytest.fixture(scope="module")
def float8(tmp_path_factory):
    """2.3 with the queries of the video in scaled float8: a scale a row in layer 0, else one."""
    tensors = load_file(V23 / "checkpoint.safetensors")
    for i in range(3):
        name = f"model.diffusion_model.transformer_blocks.{i}.attn1.to_q.weight"
        scale = np.float32([0.25 + i]) if i else np.linspace(0.01, 1, len(tensors[name]), dtype="f")
        values = tensors[name].astype(np.float32) / scale[:, None]
        tensors[name] = values.astype(ml_dtypes.float8_e4m3fn)
        tensors[name.replace(".weight", ".weight_scale")] = scale
    path = tmp_path_factory.mktemp("float8") / "checkpoint.safetensors"
    with open_release(V23 / "checkpoint.safetensors") as release:
        metadata = release.files[0].metadata
    save_file(tensors, path, metadata)
    return path, tensors


def queries(form, path):
    """Of the video's self-attention, from a file: the parameters that a linear map has of it."""
    with open_release(path) as release:
        wanted = release.parameters("transformer", release.config("transformer"))
        wanted = [p for p in wanted if p.path[1:] == ("video_self", "to_q", "weight")]
        wanted = [dataclasses.replace(p, form=form) for p in wanted]
        return {p.path[-1]: value for p, value in release.stream("transformer", wanted)}


def test_scaled_float8_stays_as_stored(float8):
    """And becomes another form from what it means."""
    path, tensors = float8
    query = queries("fp8", path)
    for i in range(3):
        name = f"model.diffusion_model.transformer_blocks.{i}.attn1.to_q.weight"
        np.testing.assert_array_equal(query["weight"][i].view(jnp.uint8), tensors[name].view("u1"))
        scale = np.broadcast_to(tensors[f"{name}_scale"], len(tensors[name]))
        np.testing.assert_array_equal(query["scale"][i], scale)
    meant = quantized(dequantized(query["weight"], query["scale"]), "int8")
    other = queries("int8", path)
    np.testing.assert_array_equal(other["weight"], meant[0])
    np.testing.assert_array_equal(other["scale"], meant[1])


def test_float8_without_a_scale_means_what_it_says(float8, tmp_path):
    """Kept as it is if it is e4m3; e5m2, which has less mantissa, is rounded to that."""
    _, tensors = float8
    name = "model.diffusion_model.transformer_blocks.{}.attn1.to_q.weight"
    kinds = (ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2)
    with open_release(float8[0]) as release:
        metadata = release.files[0].metadata
    for kind in kinds:
        small = {name.format(i): tensors[name.format(i)].astype("f").astype(kind) for i in range(3)}
        kept = {k: v for k, v in tensors.items() if not k.endswith("attn1.to_q.weight_scale")}
        save_file(kept | small, tmp_path / f"{kind.__name__}.safetensors", metadata)
        query = queries("fp8", tmp_path / f"{kind.__name__}.safetensors")
        assert query["weight"].dtype == jnp.float8_e4m3fn
        want = np.stack([*small.values()]).astype(np.float32)
        got = dequantized(query["weight"], query["scale"])
        if kind is kinds[0]:
            np.testing.assert_array_equal(query["weight"].view(jnp.uint8),
                                          np.stack([*small.values()]).view("u1"))  # fmt: skip
            np.testing.assert_array_equal(got, want)
        np.testing.assert_allclose(got, want, rtol=1 / 16, atol=np.abs(want).max() / 448 / 512)


def test_loras_beside_the_weights_do_what_fused_ones_do(case):
    """With a strength for each stream; beside weights on the host, which are not copied for it."""
    found = files()
    fused, held = weights(None, found), weights(None, found, offload=True)
    lora = found.lora(V23 / "lora.safetensors", held.config)
    plain = velocities(held, case)
    first = held.params()["transformer"]["blocks"]["video_self"]["to_q"]["weight"]
    assert first.sharding.memory_kind == "pinned_host"
    for strength in (Strength(1, 0.5, 0.25), Strength(0.25, 2, -1)):
        loras = ((lora, strength),)
        got, want = velocities(held, case, loras), velocities(fused, case, loras)
        for have, expect, before in zip(got, want, plain, strict=True):
            np.testing.assert_allclose(have, expect, atol=1e-5, rtol=1e-5)
            assert relative(have, before) > 1e-3
        now = held.params(loras)["transformer"]["blocks"]["video_self"]["to_q"]
        assert now["weight"] is first
    jax.tree.map(np.testing.assert_array_equal, velocities(held, case), plain)


def test_a_lora_beside_quantised_weights_is_not_rounded():
    found = files()
    held = weights("int4", found)
    lora = found.lora(V23 / "lora.safetensors", held.config)
    before = mapping.leaves(held.params()["transformer"])
    after = mapping.leaves(held.params(((lora, Strength(0.5, 0.5, 0.5)),))["transformer"])
    added = {path: leaf for path, leaf in after.items() if "adapter" in path}
    assert all(after[path] is leaf for path, leaf in before.items())
    for i, layer in enumerate(added[("blocks", "video_self", "to_q", "adapter", "b")]):
        target = lora.targets.get(f"transformer_blocks.{i}.attn1.to_q")
        if target is not None:
            want = np.float32(0.5 * target.scale) * target.b.astype(np.float32)
            np.testing.assert_array_equal(layer[:, : target.rank], want)
    assert {leaf.dtype for leaf in added.values()} == {jnp.dtype("float32")}
    assert set(mapping.leaves(held.params()["transformer"])) == set(before)


@pytest.mark.parametrize("form", [None, "int4"])
def test_weights_on_the_host_give_the_same_velocities_bit_for_bit(form, case):
    got, want = velocities(weights(form, offload=True), case), velocities(weights(form), case)
    jax.tree.map(np.testing.assert_array_equal, got, want)


def test_a_text_encoder_on_the_host_gives_the_same_features():
    """But for what the compiler of a CPU fuses otherwise in a loop by twos."""

    def features(offload):
        given = {"connect": False, "dtype": "float32", "quantize": "int8", "offload": offload}
        encoder = TextEncoder.load(V23 / "checkpoint.safetensors", V23 / "gemma", **given)
        return encoder.features(["a dog barks", ""])

    for got, want in zip(features(True), features(False), strict=True):
        np.testing.assert_allclose(got, want, atol=1e-5)


def test_a_clip_is_made_of_quantised_weights(tmp_path, capsys, monkeypatch):
    """Of transformer and text encoder, on the host, with a LoRA beside them; it is remembered.

    Of 2.0, whose vocoder is soon compiled.
    """
    one = make_mesh(devices=jax.devices()[:1])
    monkeypatch.setattr(pipeline, "fitting_mesh", lambda *_, **__: one)
    out = tmp_path / "clip.mp4"
    argv = [str(V20 / "checkpoint.safetensors"), "a dog barks", f"--gemma-root={V20 / 'gemma'}"]
    argv += [
        "--quantize=int8-products",
        "--offload",
        f"--lora={V20 / 'lora.safetensors'}",
        "--num-frames=9",
        "--height=64",
        "--width=64",
        "--stage1.steps=2",
    ]
    argv += ["--recipe=one_stage", "--dtype=float32", f"--output-path={out}"]
    assert sample.cli(argv) == 0, capsys.readouterr().err
    assert media.read_clip(out).video.shape == (9, 64, 64, 3)
    assert json.loads(media.read_about(out))["command"]["quantize"] == "int8-products"


@pytest.mark.parametrize("flag", ["--quantize=int8", "--offload"])
def test_a_training_is_not_quantised_and_stays_on_the_devices(flag, capsys):
    assert sample.cli(["--workdir=w", flag]) == 2
    assert capsys.readouterr().err.strip().endswith("not for what train left in a workdir")


def test_an_unknown_form_is_one_line():
    with pytest.raises(UserError, match=r"^quantize='int5' is not one of int8, fp8, int4, int8-pr"):
        Pipeline.from_pretrained(V23 / "checkpoint.safetensors", quantize="int5")
