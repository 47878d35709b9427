"""Files of prompts, whose lines may say what else a clip is given."""

import contextlib
import dataclasses
import json
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest

from ltx2_jax import sample
from ltx2_jax.errors import UserError
from ltx2_jax.media.media import Clip
from ltx2_jax.sampling import flags, wishes
from ltx2_jax.sampling.making import Maker, Way
from ltx2_jax.sampling.output import Made
from ltx2_jax.sampling.pipeline import Pipeline
from ltx2_jax.sampling.tasks import Asked, Task
from ltx2_jax.sampling.wishes import Wish, read_wishes


@pytest.fixture
def folder(tmp_path):
    for name in ("a.png", "b.png", "c.mp4", "d.wav"):
        (tmp_path / name).touch()
    return tmp_path


def read(folder, *lines):
    path = folder / "prompts.jsonl"
    path.write_text("\n".join(x if isinstance(x, str) else json.dumps(x) for x in lines))
    return read_wishes(path, "--prompts")


def test_names_are_those_of_the_call():
    call = {field.name for of in (Way, Asked) for field in dataclasses.fields(of)}
    assert set(wishes.KINDS) == call - {"notes", "batch_size"}


def test_lines_are_prompts_or_objects_with_files_beside_the_file(folder):
    found = read(
        folder,
        "a dog barks {twice}",
        {"prompt": "a cat", "seed": 3, "fps": 24, "video": None, "sound": False},
        {"prompt": "a", "image": "a.png", "audio": str(folder / "d.wav")},
        {"prompt": "b", "image": ["a.png", 0, 1]},
        {"prompt": "c", "keyframes": [["a.png", 0, 1.0], ["b.png", -1, 0.5, 20]]},
        {"prompt": "d", "references": ["c.mp4", "c.mp4"], "dub": ["c.mp4", 0.5]},
        {"prompt": "e", "changes": {"stage1.steps": 3, "stage1.sigmas": [1, 0.5, 0]}},
        {"prompt": "f", "image": ["a.png", 8], "enhancer": "c.mp4"},
        {"prompt": "g", "enhancer": "of/the-hub"},
    )
    a, b, c, d = (str(folder / name) for name in ("a.png", "b.png", "c.mp4", "d.wav"))
    assert found[0] == Wish("a dog barks {twice}", where=found[0].where)
    assert [wish.given for wish in found] == [
        {},
        {"seed": 3, "fps": 24, "sound": False},
        {"image": [a], "audio": d},
        {"image": [(a, 0, 1)]},
        {"keyframes": [(a, 0, 1.0), (b, -1, 0.5, 20)]},
        {"references": [c, c], "dub": (c, 0.5)},
        {"changes": {"stage1.steps": "3", "stage1.sigmas": "(1, 0.5, 0)"}},
        {"image": [(a, 8)], "enhancer": c},
        {"enhancer": "of/the-hub"},
    ]
    assert found[5].files == (folder / "c.mp4",) * 3
    # What a clip remembers is read again.
    for wish in found[1:]:
        stored = json.loads(json.dumps(wish.given))
        assert wishes.wish_of({"prompt": wish.prompt, **stored}, folder).given == wish.given


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"prompt": "a"', r"is not JSON \("),
        ({"image": "a.png"}, '"prompt" is missing'),
        ({"prompt": " "}, '"prompt" is missing'),
        ({"prompt": "a", "imgae": "a.png"}, 'no argument is called "imgae"; did you mean image'),
        ({"prompt": "a", "batch_size": 2}, 'no argument is called "batch_size"'),
        ({"prompt": "a", "image": "no.png"}, "image: no such file: .*no.png"),
        ({"prompt": "a", "image": ["a.png", 1.5, 1]}, "is not a file, .FILE, FRAME, STRENGTH"),
        ({"prompt": "a", "image": {"a.png": 0}}, "is not a file, "),
        ({"prompt": "a", "image": ["a.png", 0, 1, 1.5]}, "is not a file, "),
        ({"prompt": "a", "image": ["a.png", 0, 1, 20, 5]}, "is not a file, "),
        ({"prompt": "a", "dub": ["c.mp4", 1, 1, 1]}, "is not a file, or "),
        ({"prompt": "a", "num_frames": -9}, "num_frames=-9 is not a whole number"),
        ({"prompt": "a", "image": 3}, "image=3 is not a file"),
        ({"prompt": "a", "num_frames": "9"}, 'num_frames="9" is not a whole number'),
        ({"prompt": "a", "seed": 2**32}, "seed=4294967296 is not a whole number from 0 to"),
        ({"prompt": "a", "picture": 0}, "picture=0 is not true or false"),
        ({"prompt": "a", "start": True}, "start=true is not a number"),
        ('{"prompt": "a", "duration": NaN}', "duration=NaN is not seconds"),
        ({"prompt": "a", "recipe": "best"}, 'recipe="best" is not one_stage or two_stage'),
        ({"prompt": "a", "changes": "stage1.steps=3"}, "is not an object such as"),
        ({"prompt": "a", "auto_duration": [1]}, r"auto_duration=\[1\] is not \[MIN, MAX\]"),
        ({"prompt": "a", "dub": ["c.mp4", "c.mp4"]}, "dub=.* is not a file, or "),
    ],
)
def test_a_line_that_cannot_be_is_named(folder, line, message):
    with pytest.raises(UserError, match=f"^--prompts: .*prompts.jsonl, line 2: .*{message}"):
        read(folder, "a", line)


class Recorder:
    """A maker that notes what it is asked for."""

    seed = 10

    def __init__(self):
        self.checked, self.calls = [], []

    def check(self, prompts, **given):
        self.checked.append(given)
        if given.get("image") == "refused":
            raise UserError("an image too many")

    def make(self, prompts, **given):
        if given.get("image") == "refused":
            raise UserError("an image too many")
        self.calls.append((prompts, given))
        return [f"{prompt}/{seed}" for prompt, seed in zip(prompts, given["seed"], strict=True)]


def test_clips_come_in_the_order_of_lines_and_what_lines_share_is_made_together():
    maker = Recorder()
    asked = [
        Wish("a"),
        Wish("b", {"num_frames": 9}),
        Wish("c", {"seed": 5}),
        Wish("d", {"duration": 2, "changes": {"stage1.steps": "3"}}),
    ]
    shared = {"num_frames": 17, "fps": 8, "changes": {"stage1.steps": "9", "image_crf": "0"}}
    made = wishes.make(maker, asked, **shared)
    assert made == ["a/10", "b/11", "c/5", "d/13"]
    calls = [(prompts, {k: v for k, v in given.items() if v}) for prompts, given in maker.calls]
    assert calls == [
        (["a", "c"], {**shared, "seed": [10, 5]}),
        (["b"], {**shared, "num_frames": 9, "seed": [11]}),
        (["d"], {"fps": 8, "duration": 2, "seed": [13],
                 "changes": {"stage1.steps": "3", "image_crf": "0"}}),
    ]  # fmt: skip
    assert wishes.make(maker, [Wish("a"), Wish("b")], seed=2**32 - 1) == ["a/4294967295", "b/0"]
    assert wishes.make(maker, [Wish("a")], seed=0) == ["a/0"]


def test_lengths_that_the_model_chooses_are_chosen_clip_by_clip():
    maker = Recorder()
    wishes.make(maker, [Wish("a", {"duration": "auto"}), Wish("b", {"duration": "auto"})])
    wishes.make(maker, [Wish(name, {"auto_duration": (1.0, 2.0)}) for name in "cd"])
    assert [prompts for prompts, _ in maker.calls] == [["a"], ["b"], ["c"], ["d"]]


def test_what_a_line_cannot_have_is_refused_by_line_before_any_clip_is_made():
    maker = Recorder()
    asked = [Wish("a"), Wish("b", {"image": "refused"}, "prompts.jsonl, line 2")]
    with pytest.raises(UserError, match=r"prompts.jsonl, line 2: an image too many"):
        wishes.make(maker, asked)
    assert not maker.calls
    with pytest.raises(UserError, match=r"prompts.jsonl, line 2: an image too many"):
        wishes.make(maker, asked[1:])  # alone it is not checked before
    wishes.check(maker, asked[:1], fps=8.0)  # with what all lines are given
    assert maker.checked[-1]["fps"] == 8.0


def test_a_check_refuses_what_the_work_would_refuse(monkeypatch):
    """The parts that do not look at pictures; those are `_task`, which both call."""
    maker = SimpleNamespace(
        seed=1,
        chosen=lambda name, changes: "plan",
        files=None,
        _task=lambda *given: seen.append(given),
    )
    for name in ("_writer", "_check_auto"):
        monkeypatch.setattr(maker, name, lambda *a, n=name: getattr(Maker, n)(maker, *a), False)
    seen = []
    Maker.check(maker, ["a"], seed=[3], num_frames=9)
    ((asked, plan, skip),) = seen
    assert (asked.num_frames, plan, skip) == (9, "plan", False)
    for given, message in (
        ({"duration": "auto"}, "has no duration head"),
        ({"enhance_prompt": True}, "give --prompt-enhancer-gemma-root"),
        ({"seed": [1, 2]}, "2 seeds for 1 prompts"),
    ):
        with pytest.raises(UserError, match=message):
            Maker.check(maker, ["a"], **given)


def test_a_clip_of_a_line_remembers_what_the_line_gave_it(folder):
    (wish,) = read(folder, {"prompt": "a cat", "seed": 6, "num_frames": 9, "image": "a.png"})
    made = Made(None, None, Task(9, 16, 16, 8.0), "a cat", {"seed": 6})
    command = sample._remembered(flags.read(["model", "--prompts=x", "--crf=20"]), made, wish)
    path, frames = folder / "clip.mp4", np.zeros((9, 16, 16, 3), np.uint8)
    Clip(frames, 8.0, about=json.dumps({"command": command})).save(path)

    def again(*more):
        argv = ["--again", str(path), *more]
        args = sample._again(flags.read(argv), argv)
        return args, sample._asked(args)

    args, asked = again()
    assert (args.model, args.seed, args.prompts) == (["model"], 6, None)
    given = {"num_frames": 9, "image": [str(folder / "a.png")]}
    assert [(one.prompt, one.given) for one in asked] == [("a cat", given)]
    args, asked = again("--num-frames=17", "--seed=7")  # what is said now counts
    assert (args.seed, args.num_frames) == (7, 17)
    assert [one.given for one in asked] == [{"image": given["image"]}]
    for more in (["--prompt=a dog"], [f"--prompts={folder / 'dogs.txt'}"]):
        (folder / "dogs.txt").write_text("a dog")
        assert [one.prompt for one in again(*more)[1]] == ["a dog"]
    (folder / "a.png").unlink()
    with pytest.raises(UserError, match="--again: image: no such file"):
        again()


def test_each_clip_is_written_under_its_own_name_as_fine_as_asked(folder, monkeypatch, capsys):
    (folder / "p.jsonl").write_text('{"prompt": "c", "picture": false, "seed": 9}')
    out = folder / "new"
    argv = ["model", "b", "--prompt=a", f"--prompts={folder}/p.jsonl", "--crf=30", "--seed=4"]
    argv += [f"--output-path={out}/x.mp4", f"--save-latents={out}/l.safetensors"]
    pipe = SimpleNamespace(
        maker="maker", codec="codec", seconds={}, phase=lambda name: contextlib.nullcontext()
    )
    monkeypatch.setattr(sample, "_pipeline", lambda args: pipe)
    written, kept = [], []

    def make(maker, asked, **given):
        assert (maker, given["seed"]) == ("maker", 4)
        task = Task(9, 16, 16, 8.0)
        return [Made(None, None, task, w.prompt, {"seed": i}) for i, w in enumerate(asked)]

    def write(clip, path, codec, *, crf):
        written.append((clip.prompt, path.name, codec, crf))
        return [path]

    monkeypatch.setattr(wishes, "make", make)
    monkeypatch.setattr(Made, "write", write)
    monkeypatch.setattr(sample, "save_latents", lambda path, clip: kept.append((path.name, clip)))
    sample.main(flags.read(argv), argv)
    names = "x-000.mp4", "x-001.mp4", "x-002.wav"  # a sound without a picture is no film
    assert written == [(p, name, "codec", 30) for p, name in zip("abc", names, strict=True)]
    assert [name for name, _ in kept] == [f"l-00{i}.safetensors" for i in range(3)]
    for number, (_, clip) in enumerate(kept):
        command = clip.about["command"]
        assert (command["prompt"], command["seed"]) == (["abc"[number]], number)
    assert f"wrote {out}/x-001.mp4, seed 1\n" in capsys.readouterr().out


def test_hosts_that_share_a_folder_may_try_it_at_the_same_time(tmp_path):
    path = tmp_path / "x.mp4"
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda _: sample._check_writable(path, "--output-path"), range(400)))
    assert not any(tmp_path.iterdir())


def test_a_place_that_cannot_be_written_is_refused_before_the_model_is_read(folder):
    (folder / "dir.mp4").mkdir()
    (folder / "dir.safetensors").mkdir()
    for flag, name in (("--output-path", "a.png/x.mp4"), ("--save-latents", "dir.safetensors")):
        args = flags.read(["model", "a", f"{flag}={folder / name}", "--sound-only"])
        with pytest.raises(UserError, match=f"^{flag}: .*{name} cannot be written"):
            sample.output_paths(args, 1)


def test_clips_go_where_they_are_wanted_and_never_over_others(folder, monkeypatch):
    monkeypatch.chdir(folder)
    before = sorted(folder.iterdir())

    def names(number, *more):
        return [str(p) for p in sample.output_paths(flags.read(["model", "a", *more]), number)]

    assert names(1) == ["clip-001.mp4"]
    assert names(2) == ["clip-001-000.mp4", "clip-001-001.mp4"]
    assert names(1, "--sound-only") == ["clip-001.wav"]
    assert names(2, "--output-path=x.png") == ["x-000.png", "x-001.png"]
    assert sorted(folder.iterdir()) == before  # nothing is left of trying
    assert names(2, "--output-path=new") == ["new/000.mp4", "new/001.mp4"]
    assert names(1, "--output-path=new", "--sound-only") == ["new/000.wav"]
    for taken in ("clip-001.mp4", "clip-001-000.mp4", "clip-001.wav"):
        (folder / taken).touch()
        assert names(1) == ["clip-002.mp4"]
        assert names(2) == ["clip-002-000.mp4", "clip-002-001.mp4"]
        (folder / taken).unlink()


# ---- flags ---------------------------------------------------------------------------------------

FLAGS = {
    "--negative-prompt=blur": {"negative_prompt": "blur"},
    "--seed=3": {"seed": 3},
    "--height=64 --width=96": {"height": 64, "width": 96},
    "--num-frames=9": {"num_frames": 9},
    "--duration=2.5": {"duration": 2.5},
    "--auto-duration": {"auto_duration": []},
    "--auto-duration 2 5": {"auto_duration": [2.0, 5.0]},
    "--frame-rate=25": {"fps": 25.0},
    "--picture-only": {"sound": False},
    "--sound-only": {"picture": False},
    "--enhance-prompt": {"enhance_prompt": True},
    "--prompt-enhancer-gemma-root=it": {"enhancer": "it"},
    "--image a.png 0 0.5": {"image": [("a.png", 0, 0.5)]},
    # An image at another frame stands beside the clip.
    "--image a.png 0 1 --image b.png 8 0.5 20": {
        "image": [("a.png", 0, 1.0)], "keyframes": [("b.png", 8, 0.5, 20)]
    },
    "--keyframe a.png 0 1": {"keyframes": [("a.png", 0, 1.0)]},
    "--num-generated-keyframes=4": {"num_generated_keyframes": 4},
    "--audio-path=d.wav --audio-start-time=1.5 --audio-max-duration=3": {
        "audio": "d.wav", "audio_start": 1.5, "audio_max_duration": 3.0
    },
    "--video-path=c.mp4 --start-time=1 --end-time=2 --retake=audio": {
        "video": "c.mp4", "start": 1.0, "end": 2.0, "retake": "audio"
    },
    "--extend=1": {"extend": 1.0},
    "--extend-before=2": {"extend_before": 2.0},
    "--video-conditioning c.mp4 0.5": {"references": [("c.mp4", 0.5)]},
    "--reference-video=c.mp4 --reference-strength=0.5": {"dub": ("c.mp4", 0.5)},
    "--voice=d.wav": {"voice": "d.wav"},
    "--recipe=two_stage --skip-stage-2": {"recipe": "two_stage", "skip_stage_2": True},
    "--max-batch-size=2": {"batch_size": 2},
    "--num-inference-steps=5": {"changes": {"stage1.steps": "5"}},
    "--video-cfg-guidance-scale=2": {"changes": {"stage1.video.cfg": "2.0"}},
    "--audio-stg-guidance-scale=0": {"changes": {"stage1.audio.stg": "0.0"}},
    "--audio-rescale-scale=0.5": {"changes": {"stage1.audio.rescale": "0.5"}},
    "--video-skip-step=1": {"changes": {"stage1.video.skip_step": "1"}},
    "--a2v-guidance-scale=2": {"changes": {"stage1.video.modality": "2.0"}},
    "--v2a-guidance-scale=2": {"changes": {"stage1.audio.modality": "2.0"}},
    "--steps=5 --video-guidance=2": {
        "changes": {"stage1.steps": "5", "stage1.video.cfg": "2.0"}
    },
    "--schedule=linear --audio-guidance=2": {
        "changes": {"stage1.schedule": "linear", "stage1.audio.cfg": "2.0"}
    },
    "--distilled-lora-strength-stage-1=0 --distilled-lora-strength-stage-2=0.5": {
        "changes": {"stage1.distilled_lora": "0.0", "stage2.distilled_lora": "0.5"}
    },
    # What names its number of the recipe counts before what means the same.
    "--stage1.steps=3 --steps=5": {"changes": {"stage1.steps": "3"}},
    "--stage1.video.cfg=3 --video-cfg-guidance-scale=2": {"changes": {"stage1.video.cfg": "3"}},
}  # fmt: skip


@pytest.mark.parametrize("words", FLAGS)
def test_a_flag_asks_for_what_it_is_called(words):
    plain, asked = (
        flags.wishes(flags.read(["model", "a dog", *more])) for more in ([], words.split())
    )
    assert {name: x for name, x in asked.items() if x != plain[name]} == FLAGS[words]


def test_what_is_0_or_has_no_words_is_remembered_too(folder):
    argv = ["model", "a dog", "--seed=0", "--auto-duration", "--lora", "x", "0.5"]
    argv += ["--video-stg-guidance-scale=0", "--distilled-lora-strength-stage-2=0"]
    argv += ["--reference-video=c.mp4", "--reference-strength=0"]
    args, made = flags.read(argv), Made(None, None, Task(9, 16, 16, 8.0), "a dog", {"seed": 0})
    command = json.dumps({"command": sample._remembered(args, made, Wish("a dog"))})
    path, frames = str(folder / "clip.mp4"), np.zeros((9, 16, 16, 3), np.uint8)
    Clip(frames, 8.0, about=command).save(path)
    again = sample._again(flags.read(["--again", path]), ["--again", path])
    assert flags.wishes(again) == flags.wishes(args)
    assert again.lora == args.lora


def test_flags_of_model_and_machine_reach_the_pipeline(monkeypatch):
    monkeypatch.setattr(Pipeline, "from_pretrained", lambda *files, **given: (files, given))
    argv = ["--distilled-checkpoint-path=model", "a dog", "--gemma-root=gemma", "--mesh=2,2,2"]
    argv += ["--lora", "a", "1/0.5", "--lora", "b", "--distilled-lora", "c", "0.5"]
    argv += ["--spatial-upsampler-path=up", "--text-cache=features", "--keep", "--dtype=float32"]
    files, given = sample._pipeline(flags.read([*argv, "--quantize=int4", "--offload"]))
    assert files == ("model",)
    assert dict(given.pop("mesh").shape) == {"data": 2, "model": 2, "sequence": 2}
    assert given == {
        "text_encoder": "gemma", "loras": [("a", "1/0.5"), ("b",)], "distilled_lora": ("c", 0.5),
        "upsampler": "up", "kind": "distilled", "text_cache": "features", "keep": True,
        "dtype": "float32", "quantize": "int4", "offload": True,
    }  # fmt: skip
    _, given = sample._pipeline(flags.read(["model", "a dog"]))
    for name in ("mesh", "kind", "keep", "text_cache", "quantize"):
        assert given[name] is None
    monkeypatch.setattr(Pipeline, "from_workdir", lambda *files, **given: (files, given))
    argv = ["--workdir=run", "a ball", "--checkpoint-step=7", "--text-cache=features"]
    files, given = sample._pipeline(flags.read([*argv, "--mesh=2,2,2"]))
    assert (files, given.pop("mesh").size) == (("run",), 8)
    assert given == {"step": 7, "text_cache": "features"}
