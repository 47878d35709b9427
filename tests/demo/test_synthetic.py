"""Scripted clips: reproducible, as their captions say, and silent about when things happen."""

import csv
import dataclasses
import os
import re
from pathlib import Path

import numpy as np
import pytest

from ltx2_jax.demo import synthetic
from ltx2_jax.demo.config import SyntheticConfig
from ltx2_jax.demo.synthetic import captions, render, write_dataset
from ltx2_jax.errors import UserError
from ltx2_jax.evaluation.sync import sync_report
from ltx2_jax.media import media

CONFIG = SyntheticConfig()
COUNT_WORDS = {"once": 1, "twice": 2, "three times": 3}


def parse(caption):
    """What a caption says, read by words alone."""
    count = next(number for word, number in COUNT_WORDS.items() if word in caption)
    tempo = re.search(r"\b(slow|medium|fast)\b", caption)
    return {
        "family": "bounce" if "ball" in caption else "flash",
        "color": re.search("red|green|blue|yellow|purple", caption)[0],
        "pitch": re.search(r"\b(low|middle|high)\b", caption)[0],
        "count": count,
        "tempo": tempo and tempo[0],
    }


def test_a_clip_depends_only_on_seed_and_index():
    more = dataclasses.replace(CONFIG, num_clips=7)
    for index in (0, 1):
        first, again = render(CONFIG, index), render(more, index)
        np.testing.assert_array_equal(first.clip.video, again.clip.video)
        np.testing.assert_array_equal(first.clip.audio, again.clip.audio)
        assert first.caption == again.caption
    other = render(dataclasses.replace(CONFIG, seed=1), 0)
    assert not np.array_equal(other.events, render(CONFIG, 0).events)


@pytest.mark.parametrize(
    "config",
    [
        CONFIG,
        SyntheticConfig(num_frames=9, fps=25.0, height=16, width=16),
        SyntheticConfig(num_frames=33, fps=16.0, height=48, width=80, sample_rate=24000),
        SyntheticConfig(num_frames=2, fps=1.0, height=17, width=16),
    ],
)
def test_shapes_and_ranges_at_any_size_and_rate(config):
    for index in range(6):
        made = render(config, index)
        assert made.clip.video.shape == (config.num_frames, config.height, config.width, 3)
        assert made.clip.video.dtype == np.uint8
        assert made.clip.audio.shape == (round(config.duration * config.sample_rate), 2)
        assert made.clip.audio.dtype == np.float32
        assert 0.3 < np.abs(made.clip.audio).max() <= 0.5
        margin = min(0.2, config.duration / 8)
        assert made.events.min() >= margin
        assert made.events.max() <= config.duration - margin


def test_captions_say_what_is_in_the_clip():
    for index in range(60):
        made = render(CONFIG, index)
        said = parse(made.caption)
        assert said["family"] == made.family
        assert said["count"] == len(made.events)
        if len(made.events) > 1:
            low, high = synthetic.TEMPOS[said["tempo"]]
            assert low <= np.diff(made.events).max() <= high
            assert np.ptp(np.diff(made.events)) < 1e-9
        else:
            assert said["tempo"] is None
        # The pitch, from the spectrum of the first 60 ms.
        begin = round(made.events[0] * 16000)
        spectrum = np.abs(np.fft.rfft(made.clip.audio[begin : begin + 960, 0], 16000))
        assert spectrum.argmax() == pytest.approx(synthetic.PITCHES[said["pitch"]], abs=6)
        # The colour, from what differs most from the corner of the picture.
        frame = made.clip.video[
            np.abs(np.diff(made.clip.video.astype(int), axis=0)).argmax() // 3072
        ]
        difference = np.abs(frame.astype(int) - frame[0, 0]).sum(axis=-1)
        seen = frame[np.unravel_index(difference[:20].argmax(), difference[:20].shape)] + 0.0
        hues = {name: np.array(rgb) for name, rgb in synthetic.COLORS.items()}
        angle = {n: seen @ h / np.linalg.norm(seen) / np.linalg.norm(h) for n, h in hues.items()}
        assert angle[said["color"]] > 0.85


def test_every_colour_pitch_count_and_tempo_occurs():
    said = [parse(caption) for caption in captions(CONFIG, 400, seed=3)]
    assert {s["color"] for s in said} == set(synthetic.COLORS)
    assert {s["pitch"] for s in said} == set(synthetic.PITCHES)
    assert {s["count"] for s in said} == {1, 2, 3}
    assert {s["tempo"] for s in said} == {*synthetic.TEMPOS, None}
    assert {s["family"] for s in said} == {"bounce", "flash"}


def test_fresh_captions_are_reproducible_and_of_the_same_grammar():
    assert captions(CONFIG, 5, seed=1) == captions(CONFIG, 5, seed=1)
    assert captions(CONFIG, 5, seed=1) != captions(CONFIG, 5, seed=2)
    assert captions(CONFIG, 9, seed=1)[:5] == captions(CONFIG, 5, seed=1)
    rendered = {render(CONFIG, index).caption for index in range(600)}
    fresh = captions(CONFIG, 100, seed=1)
    assert np.mean([caption in rendered for caption in fresh]) > 0.3
    assert all(len(caption) < 90 for caption in fresh)


def test_fresh_captions_are_not_those_of_the_clips_of_their_seed():
    clips = [parse(render(CONFIG, index).caption) for index in range(40)]
    fresh = [parse(caption) for caption in captions(CONFIG, 40, seed=CONFIG.seed)]
    assert np.mean([a == b for a, b in zip(clips, fresh, strict=True)]) < 0.2


def test_the_caption_does_not_tell_the_phase():
    """Phases of equal captions spread over all that fits; of one event, uniformly."""
    by_kind = {}
    for index in range(1500):
        rng = np.random.default_rng([0, 0, index])
        scene = synthetic._draw_scene(rng, CONFIG, "bounce")
        by_kind.setdefault((scene["count"], scene["tempo"]), []).append(index)
    firsts = np.array([render(CONFIG, i).events[0] for i in by_kind[1, "medium"][:120]])
    room = CONFIG.duration - 0.4
    sorted_phase = np.sort((firsts - 0.2) / room)
    uniform = (np.arange(len(firsts)) + 0.5) / len(firsts)
    assert np.abs(sorted_phase - uniform).max() < 0.15  # Kolmogorov-Smirnov, p < 0.01
    for kind, indices in by_kind.items():
        spread = np.ptp([render(CONFIG, i).events[0] for i in indices[:40]])
        assert spread > 0.3, kind


def test_sound_is_silent_before_the_first_event_and_starts_at_events():
    for index in range(10):
        made = render(CONFIG, index)
        rate = CONFIG.sample_rate
        begin = int(np.ceil(made.events[0] * rate))
        assert not made.clip.audio[:begin].any()
        for time in made.events:
            here = round(time * rate)
            before = np.abs(made.clip.audio[here - 160 : here]).max()
            after = np.abs(made.clip.audio[here : here + 160]).max()
            assert before < 0.01 < 0.25 < after


@pytest.mark.parametrize("family", ["bounce", "night"])
def test_the_ball_touches_the_floor_at_the_event(family):
    """At 200 fps the lowest frame is the frame of the event."""
    config = SyntheticConfig(num_frames=401, fps=200.0, families=(family,))
    for index in range(4):
        made = render(config, index)
        ball = np.abs(made.clip.video.astype(int) - made.clip.video[0, 0, 0]).sum(axis=3)[:, :26]
        lowest = (ball.sum(axis=2) > 100).cumsum(axis=1).argmax(axis=1)
        for time in made.events:
            window = slice(round((time - 0.1) * 200), round((time + 0.1) * 200))
            deepest = np.flatnonzero(lowest[window] == lowest[window].max()).mean()
            assert window.start + deepest == pytest.approx(time * 200, abs=2)


@pytest.mark.parametrize(("family", "partials"), [("bounce", 2), ("flash", 1), ("night", 1)])
def test_the_note_of_a_ball_has_an_overtone_and_a_beep_has_none(family, partials):
    config = SyntheticConfig(families=(family,))
    for index in range(4):
        made = render(config, index)
        pitch = round(synthetic.PITCHES[parse(made.caption)["pitch"]])
        begin = round(made.events[0] * 16000)
        spectrum = np.abs(np.fft.rfft(made.clip.audio[begin : begin + 960, 0], 16000))
        found = [spectrum[k * pitch] > 0.15 * spectrum.max() for k in (1, 2)]
        assert sum(found) == partials


def test_the_lamp_jumps_at_the_event_and_decays():
    config = SyntheticConfig(num_frames=401, fps=200.0, families=("flash",))
    for index in range(4):
        made = render(config, index)
        light = made.clip.video.astype(float).sum(axis=(1, 2, 3))
        jumps = np.sort(np.argsort(np.diff(light))[-len(made.events) :])
        np.testing.assert_allclose((jumps + 0.5) / 200, made.events, atol=1.01 / 200)
        first = jumps[0] + 3
        off = light[: first - 5].mean()
        ratio = (light[first + 30] - off) / (light[first] - off)
        assert ratio == pytest.approx(np.exp(-0.15 / synthetic.LAMP_DECAY), abs=0.02)


def test_a_frame_shows_the_mean_light_of_the_time_around_it():
    fps, decay = CONFIG.fps, synthetic.LAMP_DECAY
    light = synthetic._exposed_pulses(CONFIG, np.array([2.25 / fps]))  # frame 2: 1.5 to 2.5
    lit = np.exp(-np.linspace(0, 0.25, 10_001) / fps / decay).mean() * 0.25
    np.testing.assert_allclose(light[:3], [0, 0, lit], rtol=1e-4)


def test_a_ball_by_night_is_neither_by_day_nor_a_lamp():
    """The sync of its clips is read as well as that of the two other families."""
    night = [render(SyntheticConfig(families=("night",)), index) for index in range(24)]
    assert all("ball" in made.caption and "in the dark" in made.caption for made in night)
    assert all(made.clip.video[0, 0, 0].max() < 60 for made in night)
    report = sync_report([made.clip for made in night])
    assert report.median_lag < 0.03
    events = sum(len(made.events) for made in night)
    assert report.num_onsets == report.num_visual_onsets == events
    assert not any("night" == render(CONFIG, index).family for index in range(4))


def test_written_files_match_what_was_rendered(tmp_path):
    config = SyntheticConfig(num_clips=4)
    table = write_dataset(tmp_path / "set", config)
    rows = list(csv.DictReader(table.read_text().splitlines()))
    assert list(rows[0]) == ["video", "caption", "family", "events"]
    assert len(rows) == 4
    for index, row in enumerate(rows):
        made = render(config, index)
        assert (row["caption"], row["family"]) == (made.caption, made.family)
        events = [float(time) for time in row["events"].split(";")]
        np.testing.assert_allclose(events, made.events, atol=1e-4)
        clip = media.read_clip(table.parent / row["video"], num_frames=25, sample_rate=16000)
        difference = np.abs(clip.video.astype(int) - made.clip.video)
        assert difference.mean() < 4
        assert np.corrcoef(clip.audio[:, 0], made.clip.audio[:, 0])[0, 1] > 0.98


def test_writing_resumes_extends_and_never_mixes_configs(tmp_path, monkeypatch):
    folder = tmp_path / "set"
    config = SyntheticConfig(num_clips=3)
    written = []
    real_write = media.write_mp4

    def counting_write(path, clip, **options):
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(os.path.basename(path))
        real_write(path, clip, **options)

    monkeypatch.setattr(media, "write_mp4", counting_write)
    with pytest.raises(KeyboardInterrupt):
        write_dataset(folder, config)
    assert not (folder / "captions.csv").exists()
    monkeypatch.setattr(media, "write_mp4", real_write)
    kept = (folder / "clips" / written[0]).stat().st_mtime_ns
    write_dataset(folder, config)
    write_dataset(folder, dataclasses.replace(config, num_clips=4))
    assert (folder / "clips" / written[0]).stat().st_mtime_ns == kept
    assert len((folder / "captions.csv").read_text().splitlines()) == 5
    assert len(os.listdir(folder / "clips")) == 4
    with pytest.raises(UserError, match=r"another config \(different: fps, seed\)"):
        write_dataset(folder, dataclasses.replace(config, seed=1, fps=10.0))
    monkeypatch.setattr(synthetic, "VERSION", synthetic.VERSION + 1)
    with pytest.raises(UserError, match=r"another config \(different: version\)"):
        write_dataset(folder, config)


def test_a_table_that_is_not_written_to_its_end_does_not_appear(tmp_path, monkeypatch):
    write = Path.write_text

    def full_disk(path, text, *args, **how):
        write(path, text[:10], *args, **how)
        raise OSError(28, "No space left on device")

    config = SyntheticConfig(num_clips=1, num_frames=2, height=16, width=16)
    synthetic._claim(tmp_path, config)
    monkeypatch.setattr(synthetic, "_claim", lambda *_: None)
    monkeypatch.setattr(Path, "write_text", full_disk)
    with pytest.raises((OSError, UserError), match="No space left"):
        write_dataset(tmp_path, config)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["clips", "synthetic.json"]


@pytest.mark.parametrize("name", ["clips", "captions.csv"])
def test_a_folder_of_other_clips_is_left_alone(name, tmp_path):
    (tmp_path / name).mkdir()
    with pytest.raises(UserError, match="holds clips of unknown origin; choose another folder"):
        write_dataset(tmp_path, SyntheticConfig(num_clips=1))
    assert [path.name for path in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"height": 8}, "height must be at least 16"),
        ({"fps": 0.0}, "fps and sample_rate"),
        ({"families": ("dance",)}, "dance"),
        ({"families": ()}, "families"),
        ({"num_clips": 0}, "num_clips"),
        ({"seed": -1}, "synthetic: seed=-1 is not from 0 to 4294967295"),
    ],
)
def test_bad_configs_are_refused_by_name(change, message):
    with pytest.raises(UserError, match=message):
        SyntheticConfig(**change)


def test_captions_of_the_same_events_are_of_one_kind():
    one = "a red ball bounces twice at a fast tempo, each impact a high note"
    same = "a low note on every impact of a blue ball that bounces twice, fast"
    assert synthetic.event_kind(one) == synthetic.event_kind(same) == ("ball", "twice", "fast")
    assert synthetic.event_kind("a red lamp flashes once, the flash a low beep") == ("lamp", "once")


def test_a_caption_is_scripted_that_names_what_happens_and_how_often():
    for caption in captions(CONFIG, 20, seed=5):
        assert synthetic.is_scripted(caption)
    for caption in ("a dog barks twice", "a red ball on a lawn", "a lamp at night", ""):
        assert not synthetic.is_scripted(caption)
