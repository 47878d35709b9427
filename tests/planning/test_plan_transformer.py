"""plan of training and sampling: the programs that run, the estimates, what is refused."""

import contextlib
import dataclasses
import json
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
import tiny
from flax import nnx

from ltx2_jax import chips, config, plan, units
from ltx2_jax.data.schema import Field, Schema
from ltx2_jax.demo.config import LinearCodecConfig, RandomEncoderConfig, SyntheticConfig
from ltx2_jax.errors import UserError
from ltx2_jax.models import flops
from ltx2_jax.models.codecs.mel import MelConfig
from ltx2_jax.models.layers import Rngs
from ltx2_jax.models.remat import REMAT_POLICIES
from ltx2_jax.models.text.connectors import Connectors
from ltx2_jax.models.transformer.streams import Keep, Modality
from ltx2_jax.models.transformer.transformer import Block, LTX2Transformer
from ltx2_jax.planning import changes, estimate, programs, reports, search, topology, transformer
from ltx2_jax.planning.compiled import memory
from ltx2_jax.training import checks

CLIPS = SyntheticConfig(num_clips=8, num_frames=5, height=16, width=32, fps=12.0)
CODEC = LinearCodecConfig(
    video_strides=(4, 8, 8), video_channels=8, audio_channels=16, mel=MelConfig(sample_rate=16000)
)
CONFIG = dataclasses.replace(
    tiny.config(),
    data=config.DataConfig(synthetic=CLIPS, codec=CODEC, batch_size=8),
    mesh=config.MeshConfig(2, 2, 2),
    text=dataclasses.replace(tiny.TEXT, encoder=RandomEncoderConfig(video_dim=32, audio_dim=16)),
)
REQUEST = programs.request_of(CONFIG)


@pytest.fixture
def eight_devices(monkeypatch):
    """The machine's own devices in the place of a slice's."""
    monkeypatch.setattr(transformer, "tpu_devices", lambda name: jax.devices())
    monkeypatch.setattr(transformer, "has_compiler", lambda: True)
    monkeypatch.setattr(chips, "hbm_bytes", lambda kind: 2**30)
    monkeypatch.setattr(memory, "_kept_in_no_cache", contextlib.nullcontext)  # they are here


def test_a_clip_is_as_large_as_the_config_the_flags_or_the_default_say():
    assert REQUEST.video_shape == (2, 2, 4)
    assert programs.pixels_of(REQUEST) == (5, 16, 32)
    assert programs.request_of(CONFIG, num_frames=9).video_shape == (3, 2, 4)
    released = dataclasses.replace(CONFIG, data=config.DataConfig(path="no/such/folder"))
    request = programs.request_of(released, height=512, width=768)
    assert (request.video_shape, request.audio_length) == ((16, 16, 24), 126)
    assert programs.pixels_of(request) == (121, 512, 768)
    with pytest.raises(UserError, match="120"):
        programs.request_of(released, num_frames=120)
    films = config.FilmsConfig(buckets="768x512x49,512x512x81,512x768x49", fps=25.0)
    table = dataclasses.replace(CONFIG, data=config.DataConfig(path="clips.csv", films=films))
    request = programs.request_of(table)  # 81 frames of 512x512 are the most pixels
    assert (programs.pixels_of(request), request.fps) == ((81, 512, 512), 25.0)
    assert request.audio_length == 81  # 3.24 s at 25 latents a second
    wrong = dataclasses.replace(films, buckets="768x512x50")
    with pytest.raises(UserError, match=r"data\.films\.buckets: bucket 768x512x50: "):
        programs.request_of(dataclasses.replace(table, data=config.DataConfig(
            path="clips.csv", films=wrong)))  # fmt: skip


@pytest.mark.parametrize(
    ("release", "video", "length"),
    [("2.3", None, 50), ("linear", (2, 2, 4, 8), 50), ("2.3", (2, 2, 4, 8), 10)],
)
def test_sound_is_as_long_as_a_dataset_or_the_pictures_say(monkeypatch, release, video, length):
    """50 latents: with pictures of a release, the 25 a second of its codec count, for 5 frames."""
    fields = {"audio": Field("float32", (50, 16, 8))}
    fields |= {"video": Field("float32", video)} if video else {}
    names = ("codec", "codec_hash", "text_encoder", "text_encoder_hash")
    schema = Schema(
        release, "features", "2.3", 5, 16, 32, 12.0, **dict.fromkeys(names, ""), fields=fields
    )
    monkeypatch.setattr(programs, "_schema", lambda run: schema)
    run = dataclasses.replace(CONFIG, data=config.DataConfig(path="clips"))
    assert programs.request_of(run).audio_length == length


def test_the_train_step_is_compiled(eight_devices):
    """A clip per device and nothing recomputed."""
    option = changes.changed(CONFIG, {"model.remat": "none", "mesh": (8, 1, 1)})
    option = dataclasses.replace(option, flow=config.FlowConfig())  # one noise level a clip
    facts = transformer.plan_train(option, REQUEST, "v5p:2x2x2")
    assert facts["fits"]
    assert facts["compiled"]
    assert facts["mesh"] == {"data": 8, "model": 1, "sequence": 1}
    assert facts["replicated"] == []
    work = 8 * flops.train_flops(CONFIG.model, 16, REQUEST.audio_length, 6)
    assert facts["model_flops"] == work
    # The program does this work and that of the connectors.
    graphdef, weights = nnx.split(
        nnx.eval_shape(
            lambda: Connectors(
                CONFIG.text.video_connector, CONFIG.text.audio_connector, rngs=Rngs(0)
            )
        )
    )
    given = (tiny.batch(8)[name] for name in ("video_text", "audio_text", "text_mask"))
    run = lambda weights, *text: nnx.merge(graphdef, weights)(*text)  # noqa: E731
    connectors = 3 * flops.count(run, weights, *given)
    assert facts["flops"] * 8 == pytest.approx(work + connectors, rel=0.05)
    # Weights, moments and average are donated: the new state takes their place.
    assert facts["aliased_bytes_per_device"] > 0.95 * facts["estimate"]["state"]
    assert "remat none" in reports.describe(facts)
    json.dumps(facts)


@pytest.mark.parametrize("passes", [1, 2, 4])
def test_sampling_is_compiled_with_its_passes_and_steps(eight_devices, passes):
    facts = transformer.plan_sample(CONFIG, REQUEST, "v5p:2x2x2", batch=2, passes=passes, steps=3)
    assert facts["fits"]
    assert [loop["trips"] for loop in facts["loops"]].count(3) == 1
    terms = flops.forward_flops(CONFIG.model, 16, REQUEST.audio_length, 6)
    assert facts["model_flops"] == 2 * passes * 3 * sum(terms.values())
    assert f"3 steps of {passes} pass" in reports.describe(facts)


def test_a_sampler_that_does_not_fit_is_told_what_helps(eight_devices, monkeypatch):
    monkeypatch.setattr(chips, "hbm_bytes", lambda kind: 2**10)
    option = changes.changed(CONFIG, {"mesh": (4, 2, 1)})
    facts = transformer.plan_sample(option, REQUEST, "v5p:2x2x2", batch=4, passes=1, steps=1)
    assert not facts["fits"]
    assert [change["change"] for change in facts["helps"]] == ["--mesh=2,4,1"]
    assert "does not fit: 0.00 GiB too much" in reports.describe(facts)
    assert "by estimate    --mesh=2,4,1 saves 0.0 GiB" in reports.describe(facts)


@pytest.mark.parametrize("remat", ["block", "attention", "projections"])
def test_a_policy_saves_as_many_numbers_as_estimated(remat):
    """Counted in the residuals of one block: arrays with a row per video token and clip."""
    cfg = dataclasses.replace(CONFIG.model, num_layers=1, remat=remat, gated_attention=False)
    tokens, clips = 13, 3
    model = nnx.eval_shape(lambda: LTX2Transformer(cfg, rngs=Rngs(0)))
    graphdef, state = nnx.split(model)

    def given(count, axes, channels, width):
        shape = jax.ShapeDtypeStruct
        return Modality(
            latent=shape((clips, count, channels), jnp.float32),
            sigma=shape((clips,), jnp.float32),
            timesteps=shape((clips, 1), jnp.float32),
            positions=shape((1, axes, count, 2), jnp.float32),
            context=shape((clips, 6, width), jnp.float32),
        )

    video, audio = given(tokens, 3, 8, 32), given(5, 1, 16, 16)
    block = lambda w, *rest: nnx.merge(nnx.graphdef(_block(cfg)), w)(*rest)  # noqa: E731
    weights = nnx.state(_block(cfg))
    v, a, *conds = jax.eval_shape(
        lambda s, *streams: nnx.merge(graphdef, s).embed(*streams), state, video, audio
    )
    run = jax.checkpoint(block, policy=REMAT_POLICIES[remat], prevent_cse=False)
    residuals = jax.eval_shape(
        lambda *inputs: jax.vjp(lambda w, v, a: run(w, v, a, *inputs[3:], Keep()), *inputs[:3])[1],
        weights, v, a, *conds,
    )  # fmt: skip
    rows = [x for x in jax.tree.leaves(residuals) if x.shape[:2] == (clips, tokens)]
    assert sum(math.prod(x.shape[2:]) for x in rows) == sum(estimate.saved_rows(cfg))


def _block(cfg):
    return nnx.eval_shape(lambda: Block(cfg, rngs=Rngs(0)))


def test_stricter_policies_need_less_memory():
    chip = chips.CHIPS["v5p"]
    where = topology.slice_of("v5p:4x4x4")

    def peak(remat):
        fields = {"model.remat": remat, "data.batch_size": 64, "mesh": (64, 1, 1)}
        option = changes.changed(CONFIG, fields)
        return estimate.estimate(option, REQUEST, changes.mesh_of(option, where), chip).peak

    policies = ["attention_offload", "block", "attention", "projections"]
    peaks = [peak(policy) for policy in policies]
    assert peaks == sorted(peaks)
    fields = {"model.remat": "projections", "data.batch_size": 128, "mesh": (32, 2, 1)}
    helps = changes.what_helps_training(changes.changed(CONFIG, fields), REQUEST, where)
    saves = [change["saves"] for change in helps]
    assert saves == sorted(saves, reverse=True)
    assert "--config.model.remat=block" in [change["change"] for change in helps]


@pytest.mark.parametrize("name", ["ltx2_19b", "ltx2_3_22b", "ltx2_5_22b"])
@pytest.mark.parametrize(
    ("variant", "slice_name", "frames"),
    [
        ("", "v5p:4x4x4", 121),
        (":v5p256", "v5p:4x4x8", 121),
        (":v5p512", "v5p:4x8x8", 121),
        (":v6e256", "v6e:16x16", 121),
        (":v7x128", "tpu7x:4x4x4", 121),
        (":20s", "v5p:8x8x8", 481),
    ],
)
def test_presets_should_fit_the_slices_that_they_are_for(name, variant, slice_name, frames):
    preset = config.load(f"{Path(__file__).parents[2]}/configs/{name}.py{variant}")
    checks.check_text(preset)
    where = topology.slice_of(slice_name)
    request = programs.request_of(preset, num_frames=frames)
    mesh = changes.mesh_of(preset, where)
    checks.check_batch(preset, mesh)
    programs.check(preset, request, mesh)
    guess = estimate.estimate(preset, request, mesh, where.chip)
    assert guess.peak < where.chip.device_hbm_bytes


def test_a_search_ranks_what_fits_and_compiles_the_best(monkeypatch):
    monkeypatch.setattr(search, "has_compiler", lambda: True)
    mfu = iter([0.4, 0.6])

    def fake(option, request, name):
        times = {"mfu": next(mfu), "step": 2.0}
        return {"fits": True, "peak_bytes_per_device": 2**30, "roofline": {"practical": times}}

    monkeypatch.setattr(search, "plan_train", fake)
    facts = search.search_plans(CONFIG, REQUEST, "v5p:2x2x2", compiled=2)
    first, second, *others = facts["rows"]
    assert first["plan"]["roofline"]["practical"]["mfu"] == 0.6
    assert second["plan"]["roofline"]["practical"]["mfu"] == 0.4
    assert all(row["plan"] is None for row in others)
    estimated = [row["estimate"]["mfu"] for row in others]
    assert estimated == pytest.approx(sorted(estimated, reverse=True), abs=1e-3)
    assert {tuple(row["mesh"]) for row in facts["rows"]} > {(8, 1, 1), (1, 8, 1), (1, 1, 8)}
    table = reports.describe(facts).splitlines()
    assert "60.0%" in table[2]
    assert f"{first['batch'] / 2.0:8.2f}" in table[2]


def test_a_search_in_too_little_memory_says_the_least():
    preset = config.load(f"{Path(__file__).parents[2]}/configs/ltx2_19b.py")
    request, where = programs.request_of(preset), topology.slice_of("v6e:1x1")
    fields = {"model.remat": "attention_offload", "data.batch_size": 1}
    option = changes.changed(preset, fields)
    guess = estimate.estimate(option, request, changes.mesh_of(option, where), where.chip)
    least = f"{guess.peak / reports.GIB:.1f} GiB"
    with pytest.raises(UserError, match=rf"nothing fits the 31\.2 GiB .*; the least is {least}"):
        search.search_plans(preset, request, "v6e:1x1", compiled=1)


def test_two_slices_take_a_batch_each_and_send_each_other_gradients():
    where, two = topology.slice_of("v5p:4x4x4"), topology.slice_of("2xv5p:4x4x4")
    preset = config.load(f"{Path(__file__).parents[2]}/configs/ltx2_19b.py")
    double = changes.changed(preset, {"data.batch_size": 128})
    request = programs.request_of(preset)
    one, both = (
        estimate.estimate(c, request, changes.mesh_of(c, w), w.chip)
        for c, w in ((preset, where), (double, two))
    )
    assert dict(changes.mesh_of(double, two).shape) == {
        "slice": 2, "data": 64, "model": 1, "sequence": 1
    }  # fmt: skip
    assert (both.state, both.saved, both.compute) == (one.state, one.saved, one.compute)
    parameters = flops.total_parameters(preset.model)
    # In float32; of two slices, either sends what it holds. The connectors' are the rest.
    sent = 4 * parameters / 64
    assert both.between_slices == pytest.approx(sent / (0.9 * 50e9 / 8), rel=0.05)
    assert one.between_slices == 0
    with pytest.raises(UserError, match="64 is not a multiple of 2 slices x mesh"):
        checks.check_batch(preset, changes.mesh_of(preset, two))


# ---------------------------------------------------------------------------- what a search tries


def test_a_search_tries_batches_of_which_every_slice_has_a_part():
    """One, two or four clips for each of two slices and of two micro-batches."""
    option = changes.changed(CONFIG, {"optim.accumulate_steps": 2})
    facts = search.search_plans(option, REQUEST, "2xv6e:1x1", compiled=0)
    assert {tuple(row["mesh"]) for row in facts["rows"]} == {(1, 1, 1)}
    assert {row["batch"] for row in facts["rows"]} == {4, 8, 16}
    assert facts["fits"]


def test_of_what_was_compiled_that_which_does_not_fit_comes_last(monkeypatch):
    monkeypatch.setattr(search, "has_compiler", lambda: True)
    fits = iter([False, True, False, False])

    def fake(option, request, name):
        times = {"mfu": 0.5, "step": 1.0}
        found = {"peak_bytes_per_device": 2**30, "roofline": {"practical": times}}
        return found | {"fits": next(fits)}

    monkeypatch.setattr(search, "plan_train", fake)
    facts = search.search_plans(CONFIG, REQUEST, "v6e:1x1", compiled=2)
    first, *others, last = facts["rows"]
    assert (facts["fits"], first["plan"]["fits"], last["plan"]["fits"]) == (True, True, False)
    assert {row["plan"] is None for row in others} == {True}
    facts = search.search_plans(CONFIG, REQUEST, "v6e:1x1", compiled=2)
    assert not facts["fits"]


def test_of_gpus_a_search_compiles_nothing(monkeypatch):
    monkeypatch.setattr(search, "has_compiler", lambda: True)
    facts = search.search_plans(CONFIG, REQUEST, "h100:1", compiled=2)
    assert not any(row["plan"] for row in facts["rows"])
    assert f"not compiled   {topology.A_GPU}" in reports.describe(facts)


# ------------------------------------------------------------------------------------ what helps


@pytest.mark.parametrize(
    ("name", "fields", "wanted"),
    [
        ("v5p:2x2x1", {}, {"data.batch_size=4", "optim.accumulate_steps=2"}),
        # Halves of these would leave a micro-batch, or a slice, without its clips.
        ("v5p:2x2x1", {"optim.accumulate_steps": 2}, set()),
        ("2xv5p:2x2x1", {}, set()),
    ],
)
def test_help_is_all_that_saves_memory_and_is_allowed(name, fields, wanted):
    fields = fields | {"mesh": (4, 1, 1), "data.batch_size": 8, "model.remat": "block"}
    option, where = changes.changed(CONFIG, fields), topology.slice_of(name)
    helps = changes.what_helps_training(option, REQUEST, where)
    # The other policies keep more; model=2 would double what has no heads to split.
    wanted = wanted | {"model.remat=attention_offload"}
    assert {change["change"] for change in helps} == {
        "--mesh=2,1,2 --config.data.batch_size=4", *(f"--config.{change}" for change in wanted)
    }  # fmt: skip
    assert all(change["saves"] > 0 for change in helps)


def test_another_mesh_is_of_as_many_slices():
    option = dataclasses.replace(CONFIG, mesh=config.MeshConfig(2, 2, 2, slices=2))
    changed = changes.changed(option, {"mesh": (4, 1, 2)})
    assert changed.mesh == config.MeshConfig(4, 1, 2, slices=2)


def test_a_plan_takes_the_batch_that_tokens_give_its_clips():
    """Three times 8 clips of 16 tokens of video, and of those of audio; and a token too few."""
    tokens = 3 * 8 * (16 + REQUEST.audio_length)
    for most, clips in ((tokens, 24), (tokens - 1, 16)):
        option = changes.changed(CONFIG, {"data.batch_tokens": most})
        planned = programs.for_clips(option, REQUEST).data
        assert (planned.batch_size, planned.batch_tokens) == (clips, None)


# -------------------------------------------------------------------------------------- the command


@pytest.fixture
def command(monkeypatch, tmp_path, capsys):
    """Runs plan with a config file; returns (exit code, stdout, stderr)."""
    monkeypatch.setattr(plan.jax.config, "update", lambda *_: None)
    monkeypatch.setattr(transformer, "has_compiler", lambda: False)
    file = tmp_path / "config.py"
    file.write_text("import test_plan_transformer\nget_config = lambda arg: "
                    "test_plan_transformer.CONFIG\n")  # fmt: skip

    def run(*flags, config=True):
        given = [f"--config={file}"] if config else []
        code = plan.cli([*given, *flags])
        return code, *capsys.readouterr()

    return run


def test_without_the_compiler_arithmetic_is_printed(command):
    code, out, _ = command("--topology=v5p:2x2x2")
    assert code == 0
    assert "estimate       peak" in out
    assert "the TPU compiler is not installed" in out
    assert "between slices" not in out
    code, out, _ = command("--topology=2xv5p:2x2x2")
    assert code == 0
    assert "between slices" in out
    code, out, _ = command("--topology=v5p:2x2x2", "--what=sample", "--batch=2", "--json")
    assert code == 0
    facts = json.loads(out)
    assert facts["weight_bytes_per_device"] > 0
    assert not facts["compiled"]
    _, out, _ = command("--topology=v5p:2x2x2", "--what=sample", "--batch=2", "--json",
                        "--quantize=int8")  # fmt: skip
    assert json.loads(out)["weight_bytes_per_device"] < facts["weight_bytes_per_device"]


@pytest.mark.parametrize("flags", [[], ["--what=sample", "--batch=2"]])
def test_what_should_not_fit_by_arithmetic_is_no_success(command, monkeypatch, flags):
    small = dataclasses.replace(chips.CHIPS["v6e"], hbm_bytes=1000)
    monkeypatch.setitem(chips.CHIPS, "v6e", small)
    code, out, _ = command("--topology=v6e:1x1", "--mesh=1,1,1", *flags)
    assert code == 1
    assert "GiB too much" in out


def test_what_is_too_much_and_the_work_of_a_device_are_told(command):
    _, out, _ = command("--topology=v5p:2x2x2", "--json")
    facts = json.loads(out)
    facts |= {"fits": False, "hbm_bytes_per_device": 2 * reports.GIB, "model_flops": 8e15}
    facts["estimate"]["peak"] = 5 * reports.GIB
    text = reports.describe(facts)
    assert "should not fit: 3.0 GiB too much" in text
    assert f"{units.flops(8e15)}, {units.flops(1e15)} a device" in text


def test_the_command_plans_the_batch_that_tokens_give(command):
    tokens = 2 * 8 * (16 + REQUEST.audio_length)
    _, out, _ = command("--topology=v5p:2x2x2", f"--config.data.batch_tokens={tokens}", "--json")
    assert json.loads(out)["batch"] == 16


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--topology=v5p:2x2x2", "--mesh=3,1,1"], "sizes that divide them: 1, 2, 4, 8"),
        (["--topology=v5p:4x4x4", "--mesh=4,16,1"], "model=16 does not divide 8 attention heads; "
         "sizes that do: 1, 2, 4, 8"),
        (["--topology=v5p:4x4x4", "--mesh=2,1,32"], "sequence=32 does not divide 16 video tokens "
         "of a clip; sizes that do: 1, 2, 4, 8, 16"),
        (["--topology=v5p:3x4"], "v5p slices have three sizes; slices are v5p:2x2x1, "),
        (["--topology=v9:2x2"], "no such slice; slices are named GENERATION:SHAPE"),
        (["--topology=v5p:32x32x32"], "the largest is of 6,144 chips; slices are v5p:2x2x1, "),
        (["--topology=v5p:2x2x2", "--batch=8"], "--batch is not of --what=train, but of sample an"),
        (["--topology=v5p:2x2x2", "--compile=8"], "--compile is a number of the rows of --search"),
        (["--topology=v5p:2x2x2", "--search", "--mesh=8,1,1"], "--search tries all meshes"),
        (["--topology=v5p:2x2x2", "--what=sample", "--mesh=8,1,1", "--passes=2", "--batch=2"],
         "data=8 does not divide 2 clips x 2 passes; sizes that do: 1, 2, 4"),
        (["--topology=v5p:2x2x2", "--what=text"], "--config is not of --what=text, but of train"),
        (["--topology=v5p:2x2x2", "--config.model.in_channels=7"],
         "model.in_channels=7 is not data.codec.video_channels=8"),
        (["--topology=v5p:2x2x2", "--config.model.head_dim=7"], "head_dim=7 must be an even"),
        (["--topology=v5p:2x2x2", "--frames=8"], "num_frames=8 is not 4*k+1"),
        (["--topology=v5p:2x2x2", "--config.mesh.model=3"], "mesh (data=2, model=3, sequence=2)"),
        (["--topology=v5p:2x2x2", "--config.data.batch_size=3"], "data.batch_size=3 is not a mult"),
        (["--topology=v5p:2x2x2", "--config.model.context_dim=7"], "but model.context_dim=7"),
        (["--topology=v5p:2x2x2", "--what=sample", "--batch=2", "--config.model.context_dim=7"],
         "but model.context_dim=7"),
        (["--topology=v5p:2x2x2", "--nonsense"], "unknown flag --nonsense"),
        (["--topology=0xv5p:2x2x2"], "0 slices; a name asks for 1 to 256, as 2xv5p:4x4x4; slices "),
        (["--topology=2xv5p:3x3x3"], "sizes are 1, 2 or a multiple of 4; slices are v5p:2x2x1, "),
        (["--topology=2xv5p:2x2x1", "--config.mesh.slices=3"], "slices=3, but 2xv5p:2x2x1 is 2: "),
        (["--topology=2xv5p:2x2x1", "--config.mesh.slices=3", "--mesh=1,2,2"], "slices=3, but 2x"),
        (["--topology=2xv5p:2x2x2", "--what=sample", "--mesh=4,2,1", "--passes=2", "--batch=2"],
         "2 slices x data=4 does not divide 2 clips x 2 passes; sizes that do: 1, 2, 4"),
        (["--topology=v5p:2x2x2", "--config.init_from=x", "--config.tune={'train': ['none']}"],
         "tune.train: 'none' means no weight"),
        (["--topology=2xv5p:2x2x2", "--mesh=2,2,4"], "the 8 devices of each of the 2 slices"),
        (["--topology=8xv5p:2x2x2"], "batch_size=8 is not a multiple of 8 slices x mesh.data=2"),
        (["--topology=v5p:2x2x2", "--hosts", "--search"], "--search tries all meshes: leave --ho"),
        (["--topology=v5p:2x2x2", "--hosts", "--what=sample"], "--hosts is not of --what=sam"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_line(command, flags, message):
    code, out, error = command(*flags)
    assert (code, out) == (2, "")
    assert error.startswith("plan: error: ")
    assert error.count("\n") == 1
    assert message in error


def test_a_config_is_needed(command):
    code, _, error = command("--topology=v5p:2x2x2", config=False)
    assert code == 2
    assert "--what=train needs --config" in error
