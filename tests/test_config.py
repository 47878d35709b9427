"""Config files and flags: what is accepted, and one clear line for what is not."""

import dataclasses
import json
from pathlib import Path

import pytest
import tiny

from ltx2_jax.config import Config, load, overrides
from ltx2_jax.errors import UserError
from ltx2_jax.fields import difference, from_json, to_json
from ltx2_jax.training import trainable

QUICKSTART = str(Path(__file__).parents[1] / "configs" / "quickstart.py")


@pytest.fixture
def write(tmp_path):
    """Writes a config file and returns its path."""

    def write(text: str) -> str:
        path = tmp_path / "config.py"
        path.write_text(text)
        return str(path)

    return write


def refused(call, *args) -> str:
    with pytest.raises(UserError) as caught:
        call(*args)
    message = str(caught.value)
    assert "\n" not in message
    return message


def change(**values: str) -> Config:
    """The quickstart with `a__b="text"` for --config.a.b=text."""
    return load(QUICKSTART, {name.replace("__", "."): text for name, text in values.items()})


# ---- what is accepted ----------------------------------------------------------------------------


def test_a_field_of_a_field_changes_and_nothing_else_does():
    config = change(optim__learning_rate="3e-4", data__synthetic__num_clips="64", workdir="there")
    assert config.optim.learning_rate == 3e-4
    assert config.data.synthetic.num_clips == 64
    assert config.workdir == "there"
    changed = {line.partition(":")[0] for line in difference(load(QUICKSTART), config)}
    assert changed == {"optim.learning_rate", "data.synthetic.num_clips", "workdir"}


def test_a_whole_number_passes_as_a_float():
    value = change(optim__clip_norm="2").optim.clip_norm
    assert value == 2.0
    assert isinstance(value, float)


@pytest.mark.parametrize("text", ["2,4,8", "(2,4,8)", "[2, 4, 8]"])
def test_a_tuple_is_written_with_or_without_brackets(text):
    assert change(data__codec__video_strides=text).data.codec.video_strides == (2, 4, 8)


def test_none_and_a_value_both_fit_an_optional_field():
    assert change(optim__ema_decay="None").optim.ema_decay is None
    assert change(optim__ema_decay="0.5").optim.ema_decay == 0.5
    assert change(data__path="None").data.path is None
    assert change(data__path="some/folder").data.path == "some/folder"


def test_a_folder_may_look_like_a_number():
    assert change(workdir="2024").workdir == "2024"
    assert change(data__path="2024").data.path == "2024"


def test_fields_that_must_agree_change_together():
    config = change(model__num_heads="2", model__audio_num_heads="2")
    assert config.model.num_heads == config.model.audio_num_heads == 2
    assert change(sample__steps="8", sample__schedule="distilled").sample.steps == 8


def test_the_argument_after_the_colon_reaches_get_config(write):
    path = write(
        "from ltx2_jax.config import Config\n"
        "def helper(arg): return Config(workdir=repr(arg))\n"
        "def get_config(arg=None): return helper(arg)\n"
    )
    assert load(path).workdir == "None"
    assert load(f"{path}:").workdir == "None"
    assert load(f"{path}:large").workdir == "'large'"


def test_flags_take_their_value_after_an_equals_sign_or_a_space():
    flags = ["--config.a.b=1", "--config.c", "x=y", "--config.d", "-1", "--config.e="]
    assert overrides(flags) == {"a.b": "1", "c": "x=y", "d": "-1", "e": ""}


# ---- what is refused -----------------------------------------------------------------------------


def test_an_unknown_field_lists_the_valid_ones():
    message = refused(lambda: change(optim__learning_rat="1"))
    assert "--config.optim.learning_rat" in message
    assert "learning_rate, warmup_steps" in message
    message = refused(lambda: change(modell__width="1"))
    assert "'modell'" in message
    assert "workdir, model, text" in message


@pytest.mark.parametrize(
    ("name", "text", "kind"),
    [
        ("num_steps", "many", "int"),
        ("num_steps", "1.5", "int"),
        ("num_steps", "True", "int"),
        ("num_steps", "{[]: 1}", "int"),
        ("optim.learning_rate", "fast", "float"),
        ("optim.learning_rate", "None", "float"),
        ("optim.ema_decay", "True", "float | None"),
        ("model.gated_attention", "1", "bool"),
        ("data.codec.video_strides", "4,8", "tuple[int, int, int]"),
        ("data.codec.video_strides", "4", "tuple[int, int, int]"),
        ("data.codec.video_strides", "4,8,x", "tuple[int, int, int]"),
    ],
)
def test_a_value_of_another_type_is_named_with_the_type_wanted(name, text, kind):
    message = refused(load, QUICKSTART, {name: text})
    assert message == f"--config.{name}={text}: expected {kind}"


@pytest.mark.parametrize(
    ("name", "text", "where"),
    [
        ("optim.schedule", "cubic", "--config.optim: schedule='cubic'"),
        ("optim.accumulate_steps", "0", "--config.optim: accumulate_steps=0"),
        ("data.batch_size", "0", "--config.data: batch_size=0"),
        ("checkpoint.every_steps", "0", "--config.checkpoint: every_steps=0"),
        ("checkpoint.keep", "-1", "--config.checkpoint: keep=-1"),
        ("sample.num_clips", "0", "--config.sample: num_clips=0"),
        ("sample.schedule", "euler", "--config.sample: no schedule is called 'euler'"),
        ("sample.steps", "0", "--config.sample: steps=0"),
        ("watchdog.seconds", "0", "--config.watchdog: seconds=0"),
        ("watchdog.long_seconds", "0", "--config.watchdog: long_seconds=0"),
        ("data.films.fps", "0", "--config.data.films: fps=0.0 must be above 0"),
        ("data.films.stride", "0", "--config.data.films: stride=0"),
        ("num_steps", "0", "--config: num_steps=0"),
        ("flow.caption_dropout", "1.5", "--config.flow: caption_dropout=1.5 is not from 0 to 1"),
        ("flow.first_frame_prob", "-0.1", "--config.flow: first_frame_prob=-0.1 is not from 0"),
        ("model.remat", "some", "--config.model: remat='some'"),
        ("model.num_heads", "3", "--config.model: audio_num_heads=4 must equal num_heads=3"),
        ("data.codec.video_strides", "4,0,8", "--config.data.codec: video_strides (4, 0, 8)"),
        ("data.synthetic.height", "8", "--config.data.synthetic: synthetic: height"),
    ],
)
def test_a_value_out_of_range_is_named(name, text, where):
    assert refused(load, QUICKSTART, {name: text}).startswith(where)


def test_a_group_is_not_a_value_and_a_value_is_not_a_group():
    message = refused(lambda: change(mesh="8"))
    assert message == "--config.mesh: set its fields: data, model, sequence, slices"
    assert refused(lambda: change(seed__a="8")) == "--config.seed has no fields"


def test_a_flag_that_is_none_of_the_config_is_named():
    assert "unknown flag --confg.seed" in refused(overrides, ["--confg.seed=1"])
    assert "unknown flag run" in refused(overrides, ["run"])
    assert refused(overrides, ["--config.seed"]) == "--config.seed needs a value"
    assert refused(overrides, ["--config.a", "--config.b=1"]) == "--config.a needs a value"


def test_a_file_that_is_not_there_is_named(tmp_path):
    assert refused(load, f"{tmp_path}/none.py") == f"--config: no file {tmp_path}/none.py"
    assert refused(load, f"{tmp_path}:arg") == f"--config: no file {tmp_path}"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x = 1", ": has no function get_config(arg)"),
        (
            "def get_config(arg):\n    return {'a': 1}",
            ": get_config returned {'a': 1}, not a Config",
        ),
        ("def get_config(arg):\n    return {}[arg]", ", line 2: KeyError: 'wrong'"),
        (
            "from ltx2_jax.errors import UserError\n"
            "def get_config(arg):\n    raise UserError(f'no size {arg!r}')",
            ", line 3: no size 'wrong'",
        ),
        (
            "import no_such_module",
            ", line 1: ModuleNotFoundError: No module named 'no_such_module'",
        ),
        ("def get_config():\n    pass", ": TypeError: get_config() takes 0 positional arguments"),
        (
            "from ltx2_jax.config import *\ndef get_config(arg):\n    return Config(workdr=1)",
            ", line 3: TypeError: Config.__init__() got an unexpected keyword argument 'workdr'",
        ),
        (
            "from ltx2_jax.config import *\ndef get_config(arg):\n"
            "    return Config('w', data=DataConfig(batch_size=0))",
            ", line 3: batch_size=0 must be at least 1",
        ),
        ("def get_config(:", ": SyntaxError: invalid syntax"),
    ],
)
def test_a_file_that_fails_gives_its_line_and_reason(write, text, message):
    path = write(text)
    assert refused(load, f"{path}:wrong").startswith(f"--config: {path}:wrong{message}")


# ---- JSON and differences ------------------------------------------------------------------------


@pytest.mark.parametrize("config", [load(QUICKSTART), tiny.config()], ids=["quickstart", "tiny"])
def test_a_config_survives_json(config):
    again = from_json(Config, to_json(config))
    assert again == config
    assert not difference(config, again)
    hash(again)  # tuples came back as tuples


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda values: values.update(width=1), "Config has no field width"),
        (lambda values: values["optim"].update(beta=1), "optim: OptimConfig has no field beta"),
        (lambda values: values["optim"].update(b1="x"), "optim: b1: expected float, not 'x'"),
        (lambda values: values["optim"].update(schedule="x"), "schedule='x'"),
        (lambda values: values.update(optim=3), "optim: OptimConfig needs fields, got 3"),
        (lambda values: values.pop("workdir"), "'workdir'"),
    ],
)
def test_json_of_another_version_is_refused_by_field(edit, message):
    values = json.loads(to_json(tiny.config()))
    edit(values)
    text = refused(from_json, Config, json.dumps(values))
    assert text.startswith("not a Config of this version: ")
    assert message in text


def test_text_that_is_not_json_is_refused():
    assert "not a Config" in refused(from_json, Config, "{")


def test_difference_names_dotted_paths_and_both_values():
    a = tiny.config()
    optim = dataclasses.replace(a.optim, ema_decay=None)
    b = dataclasses.replace(a, seed=4, optim=optim, model=dataclasses.replace(a.model, head_dim=8))
    assert difference(a, b) == [
        "model.head_dim: 4 -> 8",
        "optim.ema_decay: 0.9 -> None",
        "seed: 0 -> 4",
    ]
    assert difference(a, a) == []


@pytest.mark.parametrize(
    ("flags", "why"),
    [
        ({"data__path": "a/b", "data__synthetic__num_clips": "3"}, "the dataset is given"),
        ({"data__path": "a/b", "text__encoder__seed": "3"}, "the dataset is given"),
        (
            {"optim__schedule": "constant", "optim__final_fraction": "0.5"},
            "optim.schedule is constant",
        ),
        ({"flow__sigma_max": "0.9"}, "flow.sigma is shifted_logit_normal"),
        ({"flow__sigma": "uniform", "flow__sigma_std": "2"}, "flow.sigma is uniform"),
        ({"flow__sigma": "uniform", "flow__sigma_tokens": "9"}, "flow.sigma is uniform"),
        (
            {"flow__video__role": "frozen", "flow__first_frame_prob": "0.5"},
            "flow.video.role is frozen",
        ),
        (
            {"flow__audio__role": "frozen", "flow__shared_sigma_prob": "0.5"},
            "flow.audio.role is frozen",
        ),
    ],
)
def test_a_flag_that_would_not_be_read_is_refused(flags, why):
    assert f"is not used: {why}" in refused(lambda: change(**flags))


@pytest.mark.parametrize(
    ("schedule", "read"),
    [
        ("linear", ("start_fraction", "final_fraction")),
        ("cosine", ("final_fraction",)),
        ("cosine_with_restarts", ("final_fraction", "restart_after", "restart_growth")),
        ("polynomial", ("power",)),
        ("step", ("step_every", "step_fraction")),
    ],
)
def test_a_flag_is_taken_by_the_schedules_that_read_it_and_by_no_other(schedule, read):
    names = ("start_fraction", "final_fraction", "restart_after", "restart_growth", "power",
             "step_every", "step_fraction")  # fmt: skip
    for name in names:
        flags = {"optim__schedule": schedule, f"optim__{name}": "2"}
        if name in read:
            assert getattr(change(**flags).optim, name) == 2
        else:
            assert f"optim.schedule is {schedule}" in refused(lambda flags=flags: change(**flags))


MIXTURE = "('a/b', 0.75), ('c', 0.25)"


def test_a_mixture_is_datasets_and_their_shares():
    data = change(data__mixture=MIXTURE, data__batch_tokens="5000").data
    assert data.mixture == data.folders == (("a/b", 0.75), ("c", 0.25))
    assert data.batch_tokens == 5000
    assert change(data__path="a/b").data.folders == (("a/b", 1.0),)
    assert change().data.folders == ()
    # What a training at the moment reads of itself: three thirds, and whole numbers.
    assert change(data__mixture="[('a', 0.333), ('b', 0.333), ('c', 0.333)]").data.mixture
    assert change(data__mixture="('a', 1),").data.mixture == (("a", 1.0),)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"mixture": "('a', 3), ('b', 1)"}, "mixture: the shares add up to 4, not to 1"),
        ({"mixture": "('a', 0.5), ('b', 0.6)"}, "mixture: the shares add up to 1.1, not to 1"),
        ({"mixture": "('a', 0.5), ('b', 0.4)"}, "mixture: the shares add up to 0.9, not to 1"),
        ({"mixture": "('a', 1.5), ('b', -0.5)"}, "mixture: the share -0.5 of 'b' is not above 0"),
        ({"mixture": "('a', 1), ('b', 0)"}, "mixture: the share 0 of 'b' is not above 0"),
        ({"mixture": "('a', 0.5), ('a/', 0.5)"}, "mixture: 'a' is named twice"),
        ({"mixture": MIXTURE, "path": "d"}, "path=d: with a mixture it is None; name all"),
        ({"batch_tokens": "0"}, "batch_tokens=0 must be at least 1"),
    ],
)
def test_a_mixture_that_cannot_be_is_refused_by_field(fields, message):
    flags = {f"data.{name}": text for name, text in fields.items()}
    assert refused(load, QUICKSTART, flags).startswith(f"--config.data: {message}")


def test_a_mixture_is_a_given_dataset():
    flags = {"data__mixture": MIXTURE, "data__codec__video_channels": "3"}
    why = "is not used: the dataset is given (data.mixture=a/b, c)"
    assert refused(lambda: change(**flags)).endswith(why)
    message = refused(load, QUICKSTART, {"data.mixture": "'a', 'b'"})
    assert message.endswith("expected tuple[tuple[str, float], ...]")


def test_a_config_made_from_another_says_its_mistake_once():
    path = str(Path(QUICKSTART).with_name("ltx2_5_22b.py"))
    message = refused(load, f"{path}:v4")
    assert message.startswith(f"--config: {path}:v4, line ")
    assert message.endswith(": variants are :v5p256, :v5p512, :v6e256, :v7x128, :20s")


def test_a_name_may_hold_a_colon(tmp_path):
    folder = tmp_path / "10:30"
    folder.mkdir()
    (folder / "c.py").write_text(Path(QUICKSTART).read_text())
    assert load(f"{folder}/c.py") == load(QUICKSTART)
    assert load(f"{folder}/c.py:ablation") == load(f"{QUICKSTART}:ablation")


@pytest.mark.parametrize("variant", ["night", "official", "shared", "video"])
def test_variants_that_tune_the_quickstarts_model_fit_it(variant):
    base, tuned = load(QUICKSTART), load(QUICKSTART.replace(".py", f"_lora.py:{variant}"))
    assert (tuned.networks, tuned.text) == (base.networks, base.text)
    trainable.check(tuned)
    assert set(tuned.flow.generated) == ({"video"} if variant == "video" else {"video", "audio"})
    assert tuned.flow.sigma_tokens is None  # noise levels as released, whatever the base had
    assert {folder for folder, _ in tuned.data.folders} >= {"workdir/quickstart/data/records"}
