"""plan of a whole clip: the programs of a recipe are those that a pipeline calls."""

import dataclasses
import json
from pathlib import Path

import jax
import numpy as np
import pytest

from ltx2_jax import plan, planning
from ltx2_jax.planning import clip, reports
from ltx2_jax.planning.text import TextConfig
from ltx2_jax.sampling import making, recipes
from ltx2_jax.sampling.loading import Files
from ltx2_jax.sampling.pipeline import Pipeline
from ltx2_jax.sharding import make_mesh
from ltx2_jax.weights.sources import open_release

GOLDEN = Path(__file__).parents[1] / "golden" / "v2.3"
SIZE = (9, 64, 128)
ONE, TWO = (recipes.choose("2.3", "distilled", upsampler=True, layers=3, name=name)
            for name in ("one_stage", "hq"))  # fmt: skip


@pytest.fixture(scope="module")
def networks():
    """Those of the golden release; headers alone are read."""
    checkpoint, upsampler = (
        GOLDEN / f"{n}.safetensors" for n in ("checkpoint", "upsampler_spatial")
    )
    with open_release(checkpoint) as model, open_release(GOLDEN / "gemma") as language:
        with open_release(upsampler) as larger:
            connectors = model.config("connectors")
            text = TextConfig(
                language.config("gemma"), model.config("text_projection"), *connectors
            )
            names = ("transformer", "video_vae", "audio_vae", "vocoder")
            return clip.Networks(text, *map(model.config, names), larger.config("upsampler"))


def called(networks, recipe, mesh, monkeypatch, **wishes):
    """What a pipeline gives its sampler, for each stage, when it makes a clip of a prompt.

    And on which mesh: its default if `mesh` is None.
    """
    calls, features = [], networks.text.features

    def texts(prompts):
        widths = {"video_text": features.video_dim, "audio_text": features.audio_dim}
        found = {k: np.zeros((len(prompts), 1024, n), features.dtype) for k, n in widths.items()}
        return found | {"text_mask": np.ones((len(prompts), 1024), bool)}

    def sampler(params, *args, **static):
        calls.append((args, static, dict(jax.sharding.get_abstract_mesh().shape)))
        request, rows = static["request"], len(args[1])
        channels = networks.audio.latent_channels
        return (
            np.zeros((rows, *request.video_shape, networks.video.latent_channels), np.float32),
            np.zeros((rows, request.audio_length, request.audio_bins, channels), np.float32),
        )

    monkeypatch.setattr(making, "make_sampler", lambda: sampler)
    pipe = Pipeline.from_pretrained(
        GOLDEN / "checkpoint.safetensors",
        text_encoder=GOLDEN / "gemma",
        upsampler=GOLDEN / "upsampler_spatial.safetensors",
        kind="distilled",
        mesh=mesh,
        keep=True,
    )
    pipe.maker.texts = texts
    monkeypatch.setattr(pipe.maker.weights, "params", lambda loras: None)
    larger = lambda x: x.repeat(2, 2).repeat(2, 3)  # noqa: E731
    monkeypatch.setattr(Files, "load_upsampler", lambda self, dtype: larger)
    frames, height, width = SIZE
    size = {"num_frames": frames, "height": height, "width": width}
    pipe.make(["a dog"], recipe=recipe, **size, **wishes)
    return calls


@pytest.mark.parametrize(("recipe", "sizes"), [(ONE, (4, 2, 1)), (TWO, (2, 2, 2))])
def test_the_samplers_are_given_what_a_pipeline_gives_them(networks, recipe, sizes, monkeypatch):
    mesh = make_mesh(*sizes)
    task = clip._task(recipe, SIZE, networks, jax.devices())
    codec = clip._codec(networks, jax.devices())
    calls = called(networks, recipe, mesh, monkeypatch)
    assert len(calls) == len(recipe.stages)
    described = lambda tree: jax.tree.map(lambda x: (np.shape(x), np.dtype(x.dtype)), tree)  # noqa: E731
    for number, (args, static, _) in enumerate(calls):
        with jax.set_mesh(mesh):
            ours, fixed = clip.stage_arguments(
                networks.sampled, networks.text, recipe, number, task, codec, mesh
            )
        # The third is the key, whose dtype is jax's own.
        assert ours[2].dtype == args[2].dtype
        assert described((*ours[:2], *ours[3:])) == described((*args[:2], *args[3:]))
        assert fixed == {k: v for k, v in static.items() if k != "graphdef"}


@pytest.fixture
def programs(monkeypatch):
    """The machine's devices in the place of a slice's; programs are lowered, not compiled."""
    lowered = []
    made_up = {"fits": True, "compile_seconds": 2.0, "peak_bytes_per_device": 2**30}

    def facts(seconds, bound="hbm"):
        return made_up | {"roofline": {"practical": {"step": seconds, "bound": bound}}}

    def compile_facts(program, mesh, model_flops):
        lowered.append((program, mesh, model_flops))
        return facts(0.5 if model_flops else 0.25, "waited" if model_flops else "hbm")

    monkeypatch.setattr(clip, "tpu_devices", lambda name: jax.devices())
    monkeypatch.setattr(clip, "compile_facts", compile_facts)
    monkeypatch.setattr(clip, "plan_text", lambda _, prompts, *__, **how: facts(prompts / 16))
    monkeypatch.setattr(clip, "plan_vae", lambda *_: facts(0.0625) | {"tiles": 4})
    return lowered


def test_a_recipe_is_one_program_after_another(networks, programs):
    recipe = recipes.distilled("2.3")
    said = []
    facts = clip.plan_clip(networks, recipe, SIZE, "v5p:2x2x2", say=said.append)
    assert said[::5] == [f"{x}: compiled in 2 s, peak 1.00 GiB" for x in ("text encoder", "sound")]
    assert [(row["name"], row["times"]) for row in facts["programs"]] == [
        ("text encoder", 1),
        ("stage 1: 8 x euler, 1 pass", 1),
        ("upsampler", 1),
        ("stage 2: 3 x euler, 1 pass", 1),
        ("picture, largest tile", 4),
        ("sound", 1),
    ]
    assert facts["seconds"] == 0.125 + 0.5 + 0.25 + 0.5 + 4 * 0.0625 + 0.25
    # Tokens are 4 in stage 1, of 2 x 1 x 2; heads are 2, and no device repeats another's work.
    assert facts["mesh"] == {"data": 1, "model": 2, "sequence": 4}
    # What one program makes is what the next one takes.
    first, larger, second, sound = (program for program, *_ in programs)
    assert [x.shape for x in first.out_info] == [(1, 2, 1, 2, 4), (1, 9, 16, 1)]
    assert larger.out_info.shape == (1, 2, 2, 4, 4)
    assert [x.shape for x in second.out_info] == [(1, 2, 2, 4, 4), (1, 9, 16, 1)]
    assert sound.out_info.shape[::2] == (1, 2)
    assert [mesh.size for _, mesh, _ in programs] == [8, 1, 8, 1]
    table = reports.describe(facts)
    assert "1.88 s a clip, 27% of them in stage 1" in table
    assert "every program fits" in table
    json.dumps(facts)


def test_passes_are_work_and_stages_of_one_size_have_nothing_between_them(networks, programs):
    recipe = recipes.distilled("2.3").replaced({"stage1.size": "1", "stage1.video.cfg": "3"})
    rows = clip.plan_clip(networks, recipe, SIZE, "v5p:2x2x2")["programs"]
    assert [row["name"] for row in rows[1:3]] == [
        "stage 1: 8 x euler, 2 passes",
        "stage 2: 3 x euler, 1 pass",
    ]
    work = [flops for *_, flops in programs[:2]]
    assert work[0] / work[1] == pytest.approx(2 * 8 / 3)


def test_a_program_that_does_not_fit_is_named_and_no_time_is_told():
    fine = {"fits": True, "compile_seconds": 1.0, "peak_bytes_per_device": 2**30,
            "roofline": {"practical": {"step": 1.0, "bound": "compute"}}}  # fmt: skip
    large = {"fits": False, "compile_seconds": 1.0, "message": "does not fit: 3.00 GiB too much"}
    task = clip.Task(9, 64, 64, 24.0)
    where = clip.one_slice("v6e:2x4", "clip")
    made = [("text encoder", 1, fine), ("stage 1", 1, large)]
    facts = clip._facts(ONE, None, task, where, make_mesh(), made)
    assert (facts["fits"], facts["seconds"]) == (False, None)
    table = reports.describe(facts)
    assert "stage 1" in table
    assert "3.00 GiB too much" in table
    assert "practical" not in table


def test_released_weights_are_split_as_far_as_a_chip_needs_it():
    networks, task = clip.CLIPS["2.3"], clip.Task(121, 512, 768, 24.0)
    codec = clip._codec(networks, jax.devices())
    shapes = [clip._shapes(recipes.distilled("2.3"), number, task, codec) for number in (0, 1)]
    assert [shape.video for shape in shapes] == [(16, 8, 12), (16, 16, 24)]
    recipe = recipes.distilled("2.3")
    assert clip._sizes(networks, recipe, shapes, 8, 31.25 * 2**30) == (1, 2, 4)
    assert clip._sizes(networks, recipe, shapes, 1, 15.75 * 2**30) == (1, 1, 1)  # and told so
    # Layers that wait on the host are no reason to split.
    assert clip._sizes(networks, recipe, shapes, 8, 31.25 * 2**30, offload=True) == (1, 1, 8)


@pytest.mark.parametrize(
    ("recipe", "image", "mesh"),
    [
        (recipes.distilled("2.3"), None, (1, 2, 4)),  # one pass in both stages, 4 tokens in one
        (ONE, None, (4, 1, 2)),  # four passes
        # A keyframe puts 8 tokens beside 16, at frame 8.
        (ONE, (np.zeros((64, 128, 3), np.uint8), 8), (4, 1, 2)),
        # And in stage 1 two beside four.
        (recipes.distilled("2.3"), (np.zeros((64, 128, 3), np.uint8), 8), (2, 2, 2)),
    ],
)
def test_a_pipeline_chooses_the_mesh_for_its_work_as_plan_does(
    networks, recipe, image, mesh, monkeypatch
):
    calls = called(networks, recipe, None, monkeypatch, image=image)
    assert [tuple(where.values()) for *_, where in calls] == [mesh] * len(recipe.stages)
    if image is None:
        assert {len(args[1]) for args, *_ in calls} == {1}  # the clip once
        task, codec = clip._task(recipe, SIZE, networks, []), clip._codec(networks, jax.devices())
        numbers = range(len(recipe.stages))
        shapes = [clip._shapes(recipe, number, task, codec) for number in numbers]
        assert clip._sizes(networks, recipe, shapes, 8, 2**30) == mesh


@pytest.fixture
def command(monkeypatch, capsys):
    """Runs plan --what=clip; returns the exit code, what plan_clip was given, and the error."""
    given = []

    def plan_clip(*args, **named):
        given.append((args, named))
        return {"fits": False}

    def run(*flags):
        code = plan.cli(["--what=clip", "--topology=v6e:2x4", *flags])
        return code, given, capsys.readouterr().err

    monkeypatch.setattr(plan.jax.config, "update", lambda *_: None)
    monkeypatch.setattr(planning, "plan_clip", plan_clip)
    monkeypatch.setattr(planning, "describe", str)
    return run


def test_the_command_names_recipe_release_and_size(command):
    flags = ["--recipe=two_stage", "--release=2.0", "--height=512", "--width=768", "--frames=9"]
    code, given, _ = command(*flags, "--mesh=2,2,2")
    command(*flags, "--quantize=int8", "--offload")
    assert code == 1  # as it does not fit
    (other, *_), how = given[1]
    assert other == dataclasses.replace(clip.CLIPS["2.0"], quantize="int8")
    ((networks, recipe, size, topology), named) = given[0]
    assert (named["offload"], how["offload"], how["sizes"]) == (False, True, None)
    assert networks == clip.CLIPS["2.0"]
    assert (recipe.name, recipe.stages[0].steps) == ("two_stage", 40)
    assert (size, topology, named["sizes"]) == ((9, 512, 768), "v6e:2x4", (2, 2, 2))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--passes=2"], "--passes is not of --what=clip"),
        (["--config=configs/ltx2_19b.py"], "--config is not of --what=clip"),
        (["--search"], "--search is not of --what=clip, but of train and sample"),
        (["--what=vae", "--recipe=hq"], "--recipe is not of --what=vae, but of clip"),
    ],
)
def test_flags_of_other_programs_are_refused(command, flags, message):
    code, given, error = command(*flags)
    assert (code, given) == (2, [])
    assert message in error


@pytest.mark.parametrize(
    ("size", "topology", "sizes", "message"),
    [
        ((10, 64, 128), "v5p:2x2x2", None, "10"),
        ((9, 96, 128), "v5p:2x2x2", None, "height=96 is not a multiple of 64"),
        (SIZE, "v5p:2x2x2", (1, 4, 2), "model=4 does not divide 2 attention heads"),
        (SIZE, "v5p:2x2x2", (1, 1, 8), "sequence=8 does not divide 4 video tokens"),
        (SIZE, "2xv5p:2x2x2", None, "--what=clip runs on one slice"),
    ],
)
def test_what_cannot_be_is_said_before_anything_is_compiled(
    networks, programs, size, topology, sizes, message
):
    with pytest.raises(plan.UserError, match=message):
        clip.plan_clip(networks, recipes.distilled("2.3"), size, topology, sizes=sizes)
    assert programs == []
