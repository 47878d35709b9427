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
from ltx2_jax.models import ltx2
from ltx2_jax.models.quantized import dequantized, quantized
from ltx2_jax.sampling import pipeline
from ltx2_jax.sampling.loading import Files, Weights
from ltx2_jax.sampling.loras import Strength
from ltx2_jax.sampling.pipeline import Pipeline
from ltx2_jax.sharding import make_mesh
from ltx2_jax.weights import loading, mapping
from ltx2_jax.weights.lora import fuse
from ltx2_jax.weights.sources import open_release

GOLDEN = Path(__file__).parents[1] / "golden"
V23 = GOLDEN / "v2.3"


def files(folder=V23, checkpoint="checkpoint.safetensors"):
    return Files.open([folder / checkpoint], folder / "gemma", None, None)


def weights(form, found=None, mesh=None):
    found = found or files()
    config = dataclasses.replace(found.networks("float32"), quantized=form)
    return Weights(found.release, config, mesh or make_mesh(devices=jax.devices()[:1]))


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
    ("form", "least", "most"), [("int8", 5e-4, 0.02), ("fp8", 2e-3, 0.08), ("int4", 0.02, 0.3)]
)
def test_velocities_stay_near_the_reference(form, least, most, case):
    held = weights(form)
    graph = ltx2.graph(held.config)
    model = nnx.merge(graph, held.params()).transformer
    v, a = forward(*nnx.split(model), *streams(case.inputs()), None)
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


def test_a_lora_is_added_before_the_rounding():
    """And the weights without it come back."""
    found = files(GOLDEN / "v2.0")
    held, plain = weights("int8", found), weights(None, found)
    lora = found.lora(GOLDEN / "v2.0" / "lora.safetensors", held.config)
    before = held.params()
    got = mapping.leaves(held.params(((lora, Strength()),))["transformer"])
    fused, changed = fuse(plain.params()["transformer"], [(lora, 1.0)], plain.config.transformer)
    assert changed
    for path, weight in mapping.leaves(fused).items():
        scale = got.get((*path[:-1], "scale"))
        rounded = scale is not None and path[-1] == "weight"
        want = quantized(weight, "int8")[0] if rounded else weight
        np.testing.assert_array_equal(got[path], want)
    jax.tree.map(np.testing.assert_array_equal, held.params(), before)


def test_a_clip_is_made_of_quantised_weights(tmp_path, capsys, monkeypatch):
    """Of transformer and text encoder, by the command; what made it is remembered."""
    one = make_mesh(devices=jax.devices()[:1])
    monkeypatch.setattr(pipeline, "fitting_mesh", lambda *_, **__: one)
    out = tmp_path / "clip.mp4"
    argv = [str(V23 / "checkpoint.safetensors"), "a dog barks", f"--gemma-root={V23 / 'gemma'}"]
    argv += ["--quantize=int8", "--num-frames=9", "--height=64", "--width=64", "--stage1.steps=2"]
    argv += ["--recipe=one_stage", "--dtype=float32", f"--output-path={out}"]
    assert sample.cli(argv) == 0, capsys.readouterr().err
    assert media.read_clip(out).video.shape == (9, 64, 64, 3)
    assert json.loads(media.read_about(out))["command"]["quantize"] == "int8"


def test_a_training_is_not_quantised(capsys):
    assert sample.cli(["--workdir=w", "--quantize=int8"]) == 2
    assert capsys.readouterr().err.strip().endswith("not for what train left in a workdir")


def test_an_unknown_form_is_one_line():
    with pytest.raises(UserError, match=r"^quantize='int5' is not one of int8, fp8, int4$"):
        Pipeline.from_pretrained(V23 / "checkpoint.safetensors", quantize="int5")
