"""The convert command: files of releases and runs, LoRA files in and out, and plain refusals."""

import dataclasses
import json
import shutil
import signal
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
import tiny
from safetensors.numpy import load_file, save_file

from ltx2_jax.convert import cli
from ltx2_jax.models.text.connectors import ConnectorConfig
from ltx2_jax.sharding import make_mesh
from ltx2_jax.training import initial
from ltx2_jax.training.checkpoint import Checkpoints
from ltx2_jax.weights import lora as loras
from ltx2_jax.weights import mapping
from ltx2_jax.weights.lora import fuse, read_lora
from ltx2_jax.weights.sources import open_release
from ltx2_jax.weights.tensor_files import TensorFile
from ltx2_jax.weights.writing import Writer

GOLDEN = Path(__file__).parents[1] / "golden"
CHECKPOINT, LORA = (GOLDEN / "v2.3" / f"{name}.safetensors" for name in ("checkpoint", "lora"))
FILES = [
    CHECKPOINT,
    GOLDEN / "v2.5" / "split" / "text_encoder.safetensors",
    GOLDEN / "v2.5" / "split" / "video_vae_diffusion.safetensors",
    GOLDEN / "v2.0" / "upsampler_spatial.safetensors",
]
SPLIT = GOLDEN / "v2.5" / "split"


def run(*arguments, code=0):
    assert cli([str(argument) for argument in arguments]) == code


def said(capsys, *arguments):
    """The one line that a refusal prints."""
    run(*arguments, code=2)
    error = capsys.readouterr().err
    assert error.startswith("convert: error: ")
    assert error.count("\n") == 1
    return error


def metadata_of(path):
    with TensorFile(path) as file:
        return file.metadata


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_a_file_of_which_nothing_is_changed_is_the_same_file(path, tmp_path, capsys):
    run(path, tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == path.read_bytes()
    assert "wrote" in capsys.readouterr().out
    assert [p.name for p in tmp_path.iterdir()] == ["again.safetensors"]


def test_a_split_pack_becomes_one_file(tmp_path):
    names = ("transformer", "text_encoder", "video_vae_conv", "audio_vae", "duration_head")
    run(*(SPLIT / f"{name}.safetensors" for name in names), tmp_path / "one.safetensors")
    with open_release(tmp_path / "one.safetensors") as release:
        assert len(release.networks) == 8
        assert release.release_of() == "2.5"


def test_dtype_is_that_of_transformer_and_connectors(tmp_path):
    run(CHECKPOINT, tmp_path / "f32.safetensors", "--dtype", "float32")
    run(tmp_path / "f32.safetensors", tmp_path / "bf16.safetensors", "--dtype=bfloat16")
    before, wide, narrow = (
        load_file(p)
        for p in (CHECKPOINT, tmp_path / "f32.safetensors", tmp_path / "bf16.safetensors")
    )
    for name, value in before.items():
        if name.startswith("model.diffusion_model."):
            assert (wide[name].dtype, narrow[name].dtype.name) == (np.float32, "bfloat16")
            np.testing.assert_array_equal(wide[name], value.astype(np.float32))
        else:
            assert wide[name].tobytes() == narrow[name].tobytes() == value.tobytes()


# ---- float8 --------------------------------------------------------------------------------------

PREFIX = "model.diffusion_model."
TO_Q = f"{PREFIX}transformer_blocks.1.attn1.to_q"


def tensors_of(path):
    """As `load_file`, float8 too."""
    with TensorFile(path) as file:
        return {name: file.read(name) for name in file.tensors}


@pytest.fixture(scope="module")
def float8(tmp_path_factory):
    """CHECKPOINT with one matrix in float8, its scales and the marks of the tools that made it."""
    tensors, path = load_file(CHECKPOINT), tmp_path_factory.mktemp("float8") / "fp8.safetensors"
    tensors[f"{TO_Q}.weight"] = tensors[f"{TO_Q}.weight"].astype(ml_dtypes.float8_e4m3fn)
    for name, value in (("weight_scale", 0.5), ("input_scale", 2)):
        tensors[f"{TO_Q}.{name}"] = np.asarray(value, np.float32)
    tensors[f"{PREFIX}scaled_fp8"] = np.zeros(2, ml_dtypes.float8_e4m3fn)
    quantization = {"_quantization_metadata": json.dumps({"layers": {TO_Q: "float8_e4m3fn"}})}
    save_file(tensors, path, metadata_of(CHECKPOINT) | quantization)
    return path


def test_float8_stays_as_it_is_stored_with_its_scales(float8, tmp_path, capsys):
    run(float8, tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == float8.read_bytes()
    assert "become" not in capsys.readouterr().out
    # So it does where it completes another file.
    tuned = {k: v for k, v in load_file(CHECKPOINT).items() if k.startswith("vae.")}
    save_file(tuned, tmp_path / "vae.safetensors", metadata_of(CHECKPOINT))
    run(tmp_path / "vae.safetensors", tmp_path / "full.safetensors", "--base", float8)
    got, want = tensors_of(tmp_path / "full.safetensors"), tensors_of(float8)
    assert {k: v.tobytes() for k, v in got.items()} == {k: v.tobytes() for k, v in want.items()}
    assert "_quantization_metadata" in metadata_of(tmp_path / "full.safetensors")


@pytest.mark.parametrize("flags", [("--lora", LORA), ("--dtype=bfloat16",)])
def test_float8_that_is_changed_is_scaled_up_and_its_dtype_is_said(flags, float8, tmp_path, capsys):
    run(float8, tmp_path / "out.safetensors", *flags)
    assert "transformer: its float8 weights become bfloat16" in capsys.readouterr().out
    got, metadata = (
        tensors_of(tmp_path / "out.safetensors"),
        metadata_of(tmp_path / "out.safetensors"),
    )
    assert set(got) == set(load_file(CHECKPOINT))  # neither scales nor marks
    assert "_quantization_metadata" not in metadata
    assert got[f"{TO_Q}.weight"].dtype == "bfloat16"
    if "--lora" not in flags:
        small = tensors_of(float8)[f"{TO_Q}.weight"].astype(np.float32)
        np.testing.assert_array_equal(got[f"{TO_Q}.weight"].astype(np.float32), small / 2)


def test_a_float8_transformer_that_is_replaced_leaves_nothing(float8, tmp_path):
    tensors = load_file(CHECKPOINT)
    tuned = {k: v for k, v in tensors.items() if k.startswith(PREFIX) and "connector" not in k}
    config = json.loads(metadata_of(CHECKPOINT)["config"])
    tuned_config = config | {"transformer": config["transformer"] | {"norm_eps": 1e-5}}
    # It says more than it holds: of VAEs, which are the base's, what the base says counts.
    stray = tuned_config | {"vae": {}, "mine": {"x": 1}}
    own = metadata_of(CHECKPOINT) | {"model_version": "2.3.9", "config": json.dumps(stray)}
    save_file(tuned, tmp_path / "tuned.safetensors", own)
    run(tmp_path / "tuned.safetensors", tmp_path / "full.safetensors", "--base", float8)
    full = tensors_of(tmp_path / "full.safetensors")
    assert {k: v.tobytes() for k, v in full.items()} == {k: v.tobytes() for k, v in tensors.items()}
    assert "_quantization_metadata" not in metadata_of(tmp_path / "full.safetensors")
    metadata = metadata_of(tmp_path / "full.safetensors")
    assert metadata["model_version"] == "2.3.9"
    assert json.loads(metadata["config"]) == tuned_config | {"mine": {"x": 1}}


def test_a_float8_transformer_in_place_of_another_keeps_what_is_said_of_it(float8, tmp_path):
    tensors = tensors_of(float8)
    tuned = {k: v for k, v in tensors.items() if k.startswith(PREFIX) and "connector" not in k}
    save_file(tuned, tmp_path / "tuned.safetensors", metadata_of(float8))
    run(tmp_path / "tuned.safetensors", tmp_path / "full.safetensors", "--base", float8)
    full = tensors_of(tmp_path / "full.safetensors")
    assert {k: v.tobytes() for k, v in full.items()} == {k: v.tobytes() for k, v in tensors.items()}
    said = [
        metadata_of(p)["_quantization_metadata"] for p in (tmp_path / "full.safetensors", float8)
    ]
    assert said[0] == said[1]


# ---- LoRA ----------------------------------------------------------------------------------------


def test_lora_files_are_merged_at_their_strengths(tmp_path):
    out = tmp_path / "merged.safetensors"
    run(CHECKPOINT, out, "--lora", LORA, "0.7", "--lora", LORA, "-0.2")
    with open_release(CHECKPOINT) as release:
        config, params = release.load("transformer")
        lora = read_lora(LORA)
        fused, _ = fuse(params, [(lora, 0.7), (lora, -0.2)], config)
        want = mapping.to_official(fused, release.parameters("transformer", config))
    got, before = load_file(out), load_file(CHECKPOINT)
    for name, value in got.items():
        bare = name.removeprefix("model.diffusion_model.")
        expected = want[bare] if bare in want else before[name]
        assert value.tobytes() == expected.tobytes(), name
    run(out, tmp_path / "more.safetensors", "--lora", LORA, "0.1")
    assert json.loads(metadata_of(tmp_path / "more.safetensors")["merged_loras"]) == [
        {"file": "lora.safetensors", "strength": strength} for strength in (0.7, -0.2, 0.1)
    ]


def test_a_merged_lora_is_extracted_again(tmp_path, capsys):
    run(CHECKPOINT, tmp_path / "base.safetensors", "--dtype=float32")
    run(tmp_path / "base.safetensors", tmp_path / "merged.safetensors", "--lora", LORA)
    run(tmp_path / "merged.safetensors", tmp_path / "lora.safetensors",
        "--extract-lora", tmp_path / "base.safetensors", "--rank=3", "--dtype=float32")  # fmt: skip
    assert f"{len(read_lora(LORA).targets)} matrices; the squared" in capsys.readouterr().out
    got, want = read_lora(tmp_path / "lora.safetensors"), read_lora(LORA)
    assert set(got.targets) == set(want.targets)
    assert got.ranks == {3}
    for module, target in want.targets.items():
        product = np.float32(target.b) @ np.float32(target.a)
        mine = np.float32(got.targets[module].b) @ np.float32(got.targets[module].a)
        np.testing.assert_allclose(mine, product, atol=2e-3 * np.abs(product).max())
    assert got.metadata["model_version"] == "2.3.0"


def test_a_bare_fine_tune_is_taken_for_a_model_like_that_before_it(tmp_path, capsys, monkeypatch):
    """Its config would be a guess, and so another one: the work is begun without it."""
    monkeypatch.setattr(loras, "extract", lambda *_, **__: (loras.Lora({}), 0.0))
    tensors = {k.removeprefix(PREFIX): v for k, v in load_file(CHECKPOINT).items() if PREFIX in k}
    tensors = {k: v for k, v in tensors.items() if "connector" not in k}
    save_file(tensors, tmp_path / "tuned.safetensors")
    given = (tmp_path / "tuned.safetensors", tmp_path / "x.safetensors", "--extract-lora")
    assert "have the same matrices" in said(capsys, *given, CHECKPOINT)


def test_another_tools_lora_becomes_an_official_one(tmp_path):
    tensors = {}
    for name, value in load_file(LORA).items():
        module, _, part = name.removeprefix("diffusion_model.").partition(".lora_")
        kind = "lora_down" if part.startswith("A") else "lora_up"
        tensors[f"lora_unet_{module.replace('.', '_')}.{kind}.weight"] = value
        tensors[f"lora_unet_{module.replace('.', '_')}.alpha"] = np.asarray(1.5, np.float32)
    save_file(tensors, tmp_path / "kohya.safetensors")
    run(tmp_path / "kohya.safetensors", tmp_path / "official.safetensors")
    lora = read_lora(tmp_path / "official.safetensors")
    for module, target in read_lora(LORA).targets.items():
        np.testing.assert_array_equal(lora.targets[module].b, target.b * np.float32(0.5))


def test_a_lora_keeps_its_dtype_unless_another_is_asked_for(tmp_path):
    save_file(
        {k: v.astype(np.float32) for k, v in load_file(LORA).items()}, tmp_path / "f32.safetensors"
    )
    for name, flags, dtype in (
        ("same", (), "float32"),
        ("bf16", ("--dtype=bfloat16",), "bfloat16"),
    ):
        run(tmp_path / "f32.safetensors", tmp_path / f"{name}.safetensors", *flags)
        kinds = {v.dtype.name for v in load_file(tmp_path / f"{name}.safetensors").values()}
        assert kinds == {dtype}


def test_the_folder_that_diffusers_saved_a_lora_in_is_a_lora(tmp_path, capsys):
    folder = tmp_path / "saved"
    folder.mkdir()
    tensors = {k.replace("diffusion_model", "transformer"): v for k, v in load_file(LORA).items()}
    stored = {"lora_adapter_metadata": '{"transformer.r": 3, "transformer.lora_alpha": 6}'}
    save_file(tensors, folder / "pytorch_lora_weights.safetensors", stored)
    run("--inspect", folder)
    assert "LoRA of rank 3, alpha / rank 2" in capsys.readouterr().out
    run(CHECKPOINT, tmp_path / "folder.safetensors", "--lora", folder)
    run(CHECKPOINT, tmp_path / "twice.safetensors", "--lora", LORA, "2")
    a, b = (load_file(tmp_path / f"{name}.safetensors") for name in ("folder", "twice"))
    assert {k: v.tobytes() for k, v in a.items()} == {k: v.tobytes() for k, v in b.items()}


def test_the_folder_of_a_peft_adapter_is_a_lora(tmp_path, capsys):
    folder = tmp_path / "adapter"
    folder.mkdir()
    tensors = {
        k.replace("diffusion_model", "base_model.model"): v for k, v in load_file(LORA).items()
    }
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text('{"r": 3, "lora_alpha": 6}')
    run("--inspect", folder)
    assert "LoRA of rank 3, alpha / rank 2" in capsys.readouterr().out
    run(folder, tmp_path / "official.safetensors")
    lora = read_lora(tmp_path / "official.safetensors")
    for module, target in read_lora(LORA).targets.items():
        np.testing.assert_array_equal(lora.targets[module].b, target.b * 2)


def test_a_place_that_cannot_be_written_is_said_before_an_extraction(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(loras, "extract", lambda *_, **__: pytest.fail("the work was done first"))
    (tmp_path / "file").write_text("")
    out = tmp_path / "file" / "x.safetensors"
    assert "cannot be written (" in said(capsys, CHECKPOINT, out, "--extract-lora", CHECKPOINT)


# ---- training runs -------------------------------------------------------------------------------

REGISTERS = 128
RUN = tiny.config(
    model=dataclasses.replace(tiny.MODEL, in_channels=4, out_channels=4),
    text=dataclasses.replace(
        tiny.TEXT,
        length=REGISTERS,
        release="2.5",
        video_connector=dataclasses.replace(tiny.TEXT.video_connector, registers=REGISTERS),
        audio_connector=dataclasses.replace(tiny.TEXT.audio_connector, registers=REGISTERS),
    ),
)


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """A run with averaged weights that differ from the last ones."""
    folder = tmp_path_factory.mktemp("run")
    mesh = make_mesh(devices=jax.devices()[:1])
    with jax.set_mesh(mesh), Checkpoints(folder, keep=1) as checkpoints:
        state = tiny.state(RUN, mesh)
        state["ema"] = jax.tree.map(lambda x: x + 1, state["ema"])
        checkpoints.save(7, state, RUN)
    return folder


def base_for(config, path, dtype="bfloat16"):
    """A release with the run's networks under other weights, and a VAE."""
    other = tiny.params(config)
    other = jax.tree.map(lambda x: -x, other)
    out = initial.as_export(config, other, param_dtype=dtype)
    vae = SPLIT / "video_vae_conv.safetensors"
    with open_release(vae) as release:
        out.metadata["model_version"] = "2.5.1"
        out.over(release).write(path)


def test_a_run_becomes_an_official_file_and_comes_back(workdir, tmp_path):
    run(workdir, tmp_path / "run.safetensors")
    with open_release(tmp_path / "run.safetensors") as release:
        assert release.version() == "2.5.0"
        config, params = release.load("transformer")
        connectors = release.load("connectors")[1]
    assert dataclasses.replace(config, dtype="float32") == RUN.model
    want = jax.tree.map(lambda x: np.asarray(x) + 1, tiny.params(RUN))
    jax.tree.map(np.testing.assert_array_equal, params, want["transformer"])
    jax.tree.map(np.testing.assert_array_equal, connectors, want["connectors"])


def test_a_run_takes_all_else_and_its_dtypes_from_a_base(workdir, tmp_path):
    base_for(RUN, tmp_path / "base.safetensors")
    run(workdir, tmp_path / "full.safetensors", "--base", tmp_path / "base.safetensors")
    base, full = load_file(tmp_path / "base.safetensors"), load_file(tmp_path / "full.safetensors")
    assert set(base) == set(full)
    for name, value in full.items():
        assert value.dtype == base[name].dtype
        same = value.tobytes() == base[name].tobytes()
        assert same != name.startswith("model.diffusion_model."), name
    metadata = metadata_of(tmp_path / "full.safetensors")
    assert metadata["model_version"] == "2.5.1"
    assert set(json.loads(metadata["config"])) == {"transformer", "vae"}


def test_a_bare_fine_tune_takes_config_and_all_else_from_a_base(tmp_path):
    prefix = "model.diffusion_model."
    tensors = load_file(CHECKPOINT)
    tuned = {
        k.removeprefix(prefix): np.ascontiguousarray(-v)
        for k, v in tensors.items()
        if k.startswith(prefix) and "connector" not in k
    }
    save_file(tuned, tmp_path / "tuned.safetensors")
    run(tmp_path / "tuned.safetensors", tmp_path / "full.safetensors", "--base", CHECKPOINT)
    full = load_file(tmp_path / "full.safetensors")
    want = tensors | {prefix + k: v for k, v in tuned.items()}
    assert {k: v.tobytes() for k, v in full.items()} == {k: v.tobytes() for k, v in want.items()}
    assert json.loads(metadata_of(tmp_path / "full.safetensors")["config"]) == json.loads(
        metadata_of(CHECKPOINT)["config"]
    )


def test_a_run_of_another_network_than_its_base_is_refused(workdir, tmp_path, capsys):
    error = said(capsys, workdir, tmp_path / "x.safetensors", "--base", CHECKPOINT)
    assert "checkpoint.safetensors: is another network (model.num_layers: 3 -> 2" in error
    assert not (tmp_path / "x.safetensors").exists()


def test_registers_that_official_code_does_not_read_are_warned_of(tmp_path, capsys):
    few = dataclasses.replace(RUN, text=tiny.TEXT)
    with pytest.warns(UserWarning, match="the connectors have 3 registers"):
        out = initial.as_export(few, tiny.params(few))
    out.write(tmp_path / "x.safetensors")
    with open_release(tmp_path / "x.safetensors") as release:  # we read it all the same
        assert release.config("connectors")[0] == dataclasses.replace(
            tiny.TEXT.video_connector, dtype=ConnectorConfig.dtype
        )
        release.load("connectors")


# ---- looking into files --------------------------------------------------------------------------


def test_inspect_says_what_every_golden_file_holds(capsys, workdir):
    files = sorted(p for p in GOLDEN.rglob("*.safetensors") if p.name != "io.safetensors")
    files = [path.parent if path.parent.name == "gemma" else path for path in files]
    run("--inspect", *files, workdir)
    out = capsys.readouterr().out
    for part in (
        "LTX-2 2.0, model_version 2.0.0",
        "transformer           203.90 k  BF16, F32       3 blocks, video 2 x 20, audio 2 x 8",
        "connectors             38.12 k  BF16, F32",
        "gemma                  62.18 k",
        "read by nothing: vocoder.mel_stft.stft_fn.inverse_basis",
        "beside: vision_model.patch_dense.bias",
        "LoRA of rank 3, alpha / rank 1",
        f"attn1.to_q{'40 x 40':>36}  blocks 0 to 2",
        f"ff.net.2{'40 x 160':>38}  block 1",  # out x in
        "rows x2, columns x2",
        "frames x2",
        "training run, step 7",
    ):
        assert part in out, part
    assert out.count("\n\n") == len(files)
    assert "! " not in out


def test_inspect_shows_what_is_wrong_with_a_network(tmp_path, capsys):
    tensors = load_file(CHECKPOINT)
    del tensors["vae.decoder.conv_in.conv.bias"]
    save_file(tensors, tmp_path / "x.safetensors", metadata_of(CHECKPOINT))
    run("--inspect", tmp_path / "x.safetensors")
    assert "missing decoder.conv_in.conv.bias" in capsys.readouterr().out


# ---- mistakes ------------------------------------------------------------------------------------


def test_a_file_that_does_not_fit_its_config_is_not_copied(tmp_path, capsys):
    prefix, tensors = "model.diffusion_model.", load_file(CHECKPOINT)
    blocks = {k: v for k, v in tensors.items() if ".transformer_blocks.1." not in k}
    strange = tensors | {f"{prefix}transformer_blocks.0.strange": np.zeros(3, np.float32)}
    codes = tensors | {"vae.decoder.conv_in.conv.bias": np.zeros(5, np.int8)}
    for wrong, message in (
        (blocks, "missing transformer_blocks.1.attn1.to_q.weight"),
        (strange, "unknown transformer_blocks.0.strange"),
        (codes, "decoder.conv_in.conv.bias is stored as int8"),
    ):
        save_file(wrong, tmp_path / "wrong.safetensors", metadata_of(CHECKPOINT))
        out = tmp_path / "out.safetensors"
        assert message in said(capsys, tmp_path / "wrong.safetensors", out)
        given = (CHECKPOINT, out, "--base", tmp_path / "wrong.safetensors")
        assert message in said(capsys, *given)
        assert not out.exists()


def test_mistakes_are_one_line_and_leave_nothing(tmp_path, capsys, workdir):
    out = tmp_path / "out.safetensors"
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(CHECKPOINT.read_bytes()[:-5])
    newer = tmp_path / "newer.safetensors"
    save_file(load_file(LORA), newer, {"model_version": "2.5.0"})
    old = tmp_path / "old"
    old.mkdir()
    (old / "weights.json").write_text('{"kind": "ltx2_jax.weights.1"}')
    for arguments, message in (
        ((CHECKPOINT,), "SRC and DST are needed"),
        ((tmp_path / "gone.safetensors", out), "gone.safetensors: no such file"),
        ((broken, out), "broken.safetensors: not a readable safetensors file (truncated"),
        ((CHECKPOINT, out, "--lora", GOLDEN / "v2.0" / "lora.safetensors"), "another release"),
        ((CHECKPOINT, out, "--lora", newer), "is for LTX-2 2.5, these weights are 2.3"),
        ((CHECKPOINT, out, "--lora", LORA, "strong"), "--lora: 'strong' is not one number"),
        ((CHECKPOINT, out, "--lora", LORA, "1", "2"), "--lora: '1 2' is not one number"),
        ((CHECKPOINT, out, "--lora", LORA, "nan"), "--lora: strength nan is not finite"),
        ((CHECKPOINT, out, "--step=3"), "--step: not for"),
        ((LORA, out, "--base", CHECKPOINT), "--base: not for"),
        ((LORA, tmp_path / "folder"), "folder: weights are written as a safetensors file: name it"),
        ((CHECKPOINT, tmp_path / "x.ckpt"), f"name it {tmp_path / 'x.safetensors'}"),
        ((workdir, tmp_path / "folder"), f"name it {tmp_path / 'folder.safetensors'}"),
        ((old, out), "old: is a folder of weights as an earlier version wrote it, which this"),
        (("--inspect", old), "does not read; use the official file that it was made from"),
        ((workdir, out, "--step=8"), "no checkpoint 8 there"),
        ((workdir, out, "--lora", LORA), "convert it first, then merge"),
        ((LORA, LORA, out), "a LoRA file is converted alone, not with"),
        ((workdir, CHECKPOINT, out), "a training run is converted alone, not with"),
        ((CHECKPOINT, out, "--rank=3"), "--rank: is that of --extract-lora"),
        ((CHECKPOINT, out, "--extract-lora", LORA, "--base", LORA), "--base: not for --extract-lo"),
        ((CHECKPOINT, out, "--extract-lora", LORA, "--lora", LORA), "--lora: not for --extract-lo"),
        (("--inspect", CHECKPOINT, "--lora", LORA), "--lora: not for --inspect"),
        (("--inspect", CHECKPOINT, "--extract-lora", LORA), "--extract-lora: not for --inspect"),
        ((FILES[3], out, "--dtype=float32"), "--dtype: "),
        ((CHECKPOINT, out, "--extract-lora", CHECKPOINT), "have the same matrices"),
        (
            (CHECKPOINT, out, "--extract-lora", SPLIT / "transformer.safetensors"),
            "is another transformer than " + f"{CHECKPOINT} (head_dim: 16 -> 20; ",
        ),
        ((SPLIT, GOLDEN / "v2.5" / "upsampler_spatial.safetensors", out), "each have a video vae"),
    ):
        assert message in said(capsys, *arguments), message
        assert not out.exists()
    left = sorted(p.name for p in tmp_path.iterdir())
    assert left == ["broken.safetensors", "newer.safetensors", "old"]


@pytest.mark.usefixtures("usual_signals")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_command_that_is_ended_leaves_nothing(number, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(Writer, "copy", lambda *_: signal.raise_signal(number))
    before = signal.getsignal(number)
    run(CHECKPOINT, tmp_path / "x.safetensors", code=130)
    assert "interrupted; nothing was written" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
    assert signal.getsignal(number) == before


def test_a_destination_that_exists_is_left_alone(tmp_path, capsys):
    out = tmp_path / "mine.safetensors"
    out.write_text("mine")
    assert "mine.safetensors: exists already" in said(capsys, CHECKPOINT, out)
    assert out.read_text() == "mine"


def test_a_disk_that_is_too_small_is_said_before_anything_is_written(tmp_path, capsys, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    assert "needs 0.0 GB" in said(capsys, CHECKPOINT, tmp_path / "x.safetensors")
    assert list(tmp_path.iterdir()) == []


def test_weights_that_are_not_finite_are_warned_of(tmp_path, capsys):
    tensors = load_file(CHECKPOINT)
    tensors["model.diffusion_model.proj_out.bias"][0] = np.nan
    save_file(tensors, tmp_path / "nan.safetensors", metadata_of(CHECKPOINT))
    run(tmp_path / "nan.safetensors", tmp_path / "wide.safetensors", "--dtype=float32")
    assert "convert: warning: NaN or infinity in proj_out.bias" in capsys.readouterr().err


def test_of_a_run_only_the_networks_are_converted(workdir, tmp_path):
    run(workdir, tmp_path / "run.safetensors")
    with open_release(tmp_path / "run.safetensors") as release:
        assert set(release.networks) == {"transformer", "connectors"}
