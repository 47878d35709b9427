"""Onsets are found where the script put them, and agreement is told from chance."""

import dataclasses
import os

import matplotlib.image
import numpy as np
import pytest
import scipy.ndimage

from ltx2_jax.demo.config import SyntheticConfig
from ltx2_jax.demo.synthetic import render
from ltx2_jax.errors import UserError
from ltx2_jax.evaluation import contact_sheet as sheet
from ltx2_jax.evaluation import sync
from ltx2_jax.evaluation.contact_sheet import contact_sheet
from ltx2_jax.media import media
from ltx2_jax.media.media import Clip

CONFIG = SyntheticConfig()
NUM_CLIPS = 48


@pytest.fixture(scope="module")
def made():
    return [render(CONFIG, index) for index in range(NUM_CLIPS)]


@pytest.fixture(scope="module")
def from_files(made, tmp_path_factory):
    """The clips after H.264 and AAC."""
    folder = tmp_path_factory.mktemp("clips")
    clips = []
    for index, item in enumerate(made):
        media.write_mp4(folder / f"{index}.mp4", item.clip)
        clips.append(media.read_clip(folder / f"{index}.mp4", sample_rate=16000))
    return clips


def degrade(clip, rng):
    """What a small generator does to a clip: blur in space and time, noise in both tracks."""
    video = scipy.ndimage.gaussian_filter(clip.video.astype(float), (0.5, 1.0, 1.0, 0))
    video = np.clip(video + rng.normal(0, 4, video.shape), 0, 255).astype(np.uint8)
    audio = clip.audio + rng.normal(0, 0.02, clip.audio.shape)
    return Clip(video, clip.fps, audio.astype(np.float32), clip.sample_rate)


def test_onsets_are_where_the_script_put_them(made):
    for item in made:
        heard = sync.audio_onsets(item.clip.audio, CONFIG.sample_rate)
        seen = sync.visual_onsets(item.clip.video, CONFIG.fps)
        assert heard.shape == seen.shape == item.events.shape, item.caption
        np.testing.assert_allclose(heard, item.events, atol=0.005)
        np.testing.assert_allclose(seen, item.events, atol=0.030, err_msg=item.caption)


def test_files_agree_and_exchanged_sounds_do_not(from_files):
    report = sync.sync_report(from_files)
    assert report.num_clips == NUM_CLIPS
    assert report.num_clips_without_audio_onset == report.num_clips_without_visual_onset == 0
    assert report.median_lag < 0.035
    assert report.subframe_median_lag < 0.010
    assert report.median_lag < report.shuffled_median_lag / 3
    assert report.shuffled_median_lag > 0.1
    assert str(report).startswith("median |lag| ")


def test_blur_and_noise_do_not_hide_agreement(made):
    rng = np.random.default_rng(0)
    report = sync.sync_report([degrade(item.clip, rng) for item in made])
    assert report.median_lag < 0.035
    assert report.median_lag < report.shuffled_median_lag / 3
    events = sum(len(item.events) for item in made)
    assert abs(report.num_onsets - events) <= 0.1 * events
    assert abs(report.num_visual_onsets - events) <= 0.1 * events


@pytest.mark.parametrize("shift", [0.1, -0.1])
def test_a_shifted_sound_track_is_measured_as_shifted(made, shift):
    samples = round(shift * CONFIG.sample_rate)
    clips = [
        Clip(item.clip.video, CONFIG.fps, np.roll(item.clip.audio, samples, axis=0))
        for item in made
    ]
    assert sync.sync_report(clips, num_shuffles=1).median_lag == pytest.approx(0.1, abs=0.01)


@pytest.mark.parametrize("rate", [8000, 16000, 44100, 48000])
def test_audio_onsets_at_any_sample_rate(rate):
    """Bursts of noise, in one channel only, over quieter noise."""
    rng = np.random.default_rng(0)
    time = np.arange(2 * rate) / rate
    audio = rng.normal(0, 0.005, (len(time), 2))
    starts = np.array([0.3, 0.9, 1.4])
    for start in starts:
        since = time - start
        envelope = np.where(since >= 0, np.exp(-np.maximum(since, 0) / 0.05), 0)
        audio[:, 0] += 0.3 * envelope * rng.normal(0, 1, len(time))
    np.testing.assert_allclose(sync.audio_onsets(audio, rate), starts, atol=0.006)


def test_nothing_happens_in_silence_noise_and_still_pictures(made):
    rng = np.random.default_rng(0)
    assert len(sync.audio_onsets(np.zeros((16000, 2)), 16000)) == 0
    assert len(sync.audio_onsets(np.zeros((0, 2)), 16000)) == 0
    assert len(sync.audio_onsets(rng.normal(0, 0.1, (16000, 2)), 16000)) == 0
    still = np.repeat(made[0].clip.video[:1], 25, axis=0)
    assert len(sync.visual_onsets(still, 12.0)) == 0
    assert len(sync.visual_onsets(np.full((25, 32, 32, 3), 90, np.uint8), 12.0)) == 0
    noise = rng.integers(0, 256, (25, 32, 32, 3)).astype(np.uint8)
    assert len(sync.visual_onsets(noise, 12.0)) == 0
    assert len(sync.visual_onsets(still[:2], 12.0)) == 0


def test_clips_without_onsets_are_counted_and_penalised_alike(made):
    clip = made[0].clip
    grey = Clip(np.full_like(clip.video, 90), clip.fps, clip.audio)
    mute = Clip(clip.video, clip.fps, np.zeros_like(clip.audio))
    soundless = Clip(clip.video, clip.fps)
    count = len(made[0].events)
    np.testing.assert_array_equal(sync.onset_lags([grey]), np.full(count, clip.duration))
    assert len(sync.onset_lags([mute, soundless])) == 0
    report = sync.sync_report([grey, mute, soundless])
    assert report.num_clips_without_visual_onset == 1
    assert report.num_clips_without_audio_onset == 2
    assert report.num_onsets == count
    empty = sync.sync_report([mute])
    assert np.isnan(empty.median_lag)
    assert np.isnan(empty.shuffled_median_lag)
    assert str(empty) == "no onset is heard in 1 clips"


def test_no_clip_keeps_its_own_sound_when_shuffled(made):
    """With two clips there is one exchange: the pooled lags are those of the swapped pair."""
    one, two = made[0].clip, made[2].clip
    swapped = [Clip(one.video, one.fps, two.audio), Clip(two.video, two.fps, one.audio)]
    report = sync.sync_report([one, two], num_shuffles=3)
    assert report.shuffled_median_lag == pytest.approx(np.median(sync.onset_lags(swapped)))
    assert sync.sync_report([one, two], seed=4) == sync.sync_report([one, two], seed=4)
    alone = sync.sync_report([one, two], kinds=["a", "b"])  # between each other then
    assert alone.shuffled_median_lag == report.shuffled_median_lag


def test_tracks_are_exchanged_between_clips_of_one_kind(made):
    clips = [item.clip for item in made[:5]]
    kinds = ["a", "b", "a", "b", "c"]
    pairs = [(0, 2), (2, 0), (1, 3), (3, 1)]  # (picture, sound); the fifth has no partner
    swapped = [dataclasses.replace(clips[i], audio=clips[j].audio) for i, j in pairs]
    report = sync.sync_report(clips, kinds=kinds, num_shuffles=3)
    assert report.shuffled_median_lag == pytest.approx(np.median(sync.onset_lags(swapped)))


def test_the_interval_holds_the_median_and_shrinks_with_more_clips(made):
    shifts = np.random.default_rng(0).integers(0, 3200, len(made))
    shifted = [
        dataclasses.replace(item.clip, audio=np.roll(item.clip.audio, shift, axis=0))
        for item, shift in zip(made, shifts, strict=True)
    ]
    few, many = sync.sync_report(shifted[:8]), sync.sync_report(shifted)
    for report in (few, many):
        assert report.interval[0] <= report.median_lag <= report.interval[1]
    assert sync.sync_report(shifted[:8], seed=1).interval != few.interval
    assert many.interval[1] - many.interval[0] < few.interval[1] - few.interval[0]


def test_contact_sheet_is_a_picture_of_every_clip(made, tmp_path):
    clips = [made[0].clip, made[1].clip, Clip(made[2].clip.video, 12.0)]
    captions = [item.caption for item in made[:2]] + ["costs $5 or $6, and has no sound"]
    path = contact_sheet(tmp_path / "new" / "sheet.png", clips, captions, title="three")
    assert os.listdir(path.parent) == ["sheet.png"]
    image = matplotlib.image.imread(path)
    assert image.shape[1] > image.shape[0] > 400
    short = contact_sheet(tmp_path / "one.png", clips[:1], captions[:1], max_frames=5)
    assert matplotlib.image.imread(short).shape[0] < image.shape[0]
    with pytest.raises(UserError, match=r"sheet\.png: 3 clips and 1 captions"):
        contact_sheet(tmp_path / "sheet.png", clips, captions[:1])


def test_all_strips_have_one_time_axis_with_what_is_heard_and_what_is_seen(
    made, tmp_path, monkeypatch
):
    long = dataclasses.replace(made[0].clip, audio=np.roll(made[0].clip.audio, 3000, axis=0))
    short = Clip(long.video[:13], 12.0, long.audio[: 13 * 16000 // 12 : 2], 8000)
    figures, figure = [], sheet._figure
    monkeypatch.setattr(sheet, "_figure", lambda *size: figures.append(figure(*size)) or figures[0])
    contact_sheet(tmp_path / "a.png", [long, short], ["costs $5 or $6", "two"], max_frames=12)
    assert [text.get_parse_math() for text in figures[0].texts if "$" in text.get_text()] == [False]
    strips, waves = figures[0].axes[::2], figures[0].axes[1::2]
    strides = 3, 2  # of 25 frames nine are shown, of 13 seven
    spans = [(-0.125, 2.125), (-1 / 12, 13 / 12)]
    for strip, wave, clip, stride, span in zip(
        strips, waves, [long, short], strides, spans, strict=True
    ):
        shown = np.concatenate(list(clip.video[::stride]), axis=1)
        np.testing.assert_array_equal(strip.images[0].get_array(), shown)
        assert strip.images[0].get_extent()[:2] == pytest.approx(span)
        assert strip.get_xlim() == wave.get_xlim() == pytest.approx(span)
        sound, lines = wave.collections
        assert sound.get_paths()[0].vertices[:, 0].max() == pytest.approx(clip.duration, abs=0.01)
        heard = [segment[0, 0] for segment in lines.get_segments()]
        np.testing.assert_allclose(heard, sync.audio_onsets(clip.audio, clip.sample_rate))
        np.testing.assert_allclose(wave.lines[0].get_xdata(), sync.visual_onsets(clip.video, 12.0))
        assert len(heard) > 0
    widths = [axes.get_position().width for axes in (*strips, *waves)]
    share = (13 / 12 + 1 / 12) / 2.25
    np.testing.assert_allclose(widths, widths[0] * np.array([1, share, 1, share]))


def test_events_are_counted_in_clips_of_the_kind_that_the_detectors_are_made_for(made):
    clips, count = [item.clip for item in made], sum(len(item.events) for item in made)
    noise = np.random.default_rng(0).integers(0, 255, clips[0].video.shape).astype(np.uint8)
    film = dataclasses.replace(clips[0], video=noise)
    silent = dataclasses.replace(clips[1], audio=None)
    found = sync.events([*clips, film, silent])
    assert (found.seen, found.heard, found.matched) == (count, count, count)
    assert found.median_lag == pytest.approx(sync.sync_report(clips).median_lag)
    assert sync.events([film, silent]) is None
    assert sync.events([]) is None


def test_what_is_heard_too_late_matches_nothing_and_silence_has_no_lag(made):
    clip = next(item.clip for item in made if len(item.events) == 1)
    late = np.concatenate([np.zeros((4000, 2), np.float32), clip.audio])[: len(clip.audio)]
    found = sync.events([dataclasses.replace(clip, audio=late)])
    assert (found.seen, found.heard, found.matched) == (1, 1, 0)
    assert found.median_lag == pytest.approx(0.25, abs=0.05)
    found = sync.events([dataclasses.replace(clip, audio=np.zeros_like(clip.audio))])
    assert (found.seen, found.heard, found.matched, found.median_lag) == (1, 0, 0, None)
