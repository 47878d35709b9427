"""Cuts of films: where scenes begin, what is none, and clips that hold no cut."""

import film
import numpy as np
import pytest

from ltx2_jax.data.buckets import Bucket
from ltx2_jax.data.clips import ClipReader, PrepareConfig, Rates
from ltx2_jax.data.table import Row
from ltx2_jax.media import scenes

SIZE = (64, 96)


def picture(seed):
    """A still of coarse blocks, uint8 [64, 96, 3]."""
    blocks = np.random.default_rng(seed).integers(30, 226, (8, 12, 3), dtype=np.uint8)
    return np.repeat(np.repeat(blocks, 8, axis=0), 8, axis=1)


def still(seed, frames):
    return np.stack([picture(seed)] * frames)


def ball(seed, frames):
    """A white ball of 16 pixels crosses a still."""
    video = still(seed, frames)
    y, x = np.ogrid[: SIZE[0], : SIZE[1]]
    for frame, image in enumerate(video):
        image[(y - 32) ** 2 + (x - 96 * frame / frames) ** 2 < 64] = 255
    return video


def fade(one, other, frames):
    shares = np.linspace(0, 1, frames)[:, None, None, None]
    return (picture(one) * (1 - shares) + picture(other) * shares).astype(np.uint8)


def pan(seed, frames):
    """A camera that moves 4 pixels a frame over a wide picture."""
    wide = np.concatenate([picture(seed + i) for i in range(4)], axis=1)
    return np.stack([wide[:, 4 * k : 4 * k + SIZE[1]] for k in range(frames)])


def flash(seed, frames, at):
    video = still(seed, frames)
    video[at] = 255
    return video


def cuts(path):
    """Indices of the first pictures of scenes, of a film of 25 a second."""
    found = scenes.watch(path)
    assert not found.fault
    assert all(round((after - before) * 25) == 1 for before, after in found.cuts)
    return [round(after * 25) for _, after in found.cuts]


def test_hard_cuts_are_found_at_their_picture_and_motion_fades_and_flashes_are_none(tmp_path):
    parts = [ball(1, 30), still(2, 12), fade(2, 3, 30), flash(3, 20, 9), pan(4, 50), ball(9, 20)]
    path = film.write_film(tmp_path / "a.mp4", np.concatenate(parts))
    first = np.cumsum([len(part) for part in parts])
    # Between the still and the fade, and between the fade and the flash, the picture is the same.
    assert cuts(path) == [first[0], first[3], first[4]]
    assert scenes.watch(path).end == pytest.approx(first[-1] / 25)


def test_cuts_beside_each_other_and_at_the_ends_are_found(tmp_path):
    parts = [still(1, 1), still(2, 9), still(3, 2), still(4, 9), still(5, 1)]
    path = film.write_film(tmp_path / "a.mp4", np.concatenate(parts))
    assert cuts(path) == [1, 10, 12, 21]
    assert cuts(film.write_film(tmp_path / "b.mp4", still(1, 2))) == []


def test_scenes_of_one_brightness_differ_by_their_colours():
    red, blue = np.zeros((36, 64, 3), np.uint8), np.zeros((36, 64, 3), np.uint8)
    red[..., 0], blue[..., 2] = 60, 60
    assert scenes.find_cuts([red] * 5 + [blue] * 5) == [5]


def test_a_film_that_breaks_off_is_known_until_there(tmp_path):
    whole = film.write_film(
        tmp_path / "a.mkv", np.concatenate([still(1, 20), still(2, 20)]), options={"g": "5"},
        stamps=[*range(30), *range(60, 70)],
    )  # fmt: skip
    found = scenes.watch(whole)
    assert [round(after * 25) for _, after in found.cuts] == [20]
    assert found.end == pytest.approx(30 / 25)
    assert "frames are missing" in found.fault
    missing = scenes.watch(tmp_path / "none.mp4")
    assert missing == scenes.Film((), 0.0, "no such file")


LENGTHS = (13, 30, 4, 17, 26)  # of scenes


@pytest.fixture(scope="module")
def cut_film(tmp_path_factory):
    """Scene n is of grey 40 + 40 n, so that a clip shows which it is of."""
    images = [film.plain(40 + 40 * n, length) for n, length in enumerate(LENGTHS)]
    path = tmp_path_factory.mktemp("scenes") / "film.mp4"
    return film.write_film(path, np.concatenate(images), tones=[440])


@pytest.mark.parametrize("fps", [None, 25.0, 12.0, 24.0, 60.0])
@pytest.mark.parametrize("start", [None, 0.51, 0.529])
def test_no_clip_of_a_cut_film_shows_two_scenes(cut_film, fps, start):
    config = PrepareConfig(9, 16, 16, fps=fps, stride=3, scenes=True)
    reader = ClipReader([Row("a", cut_film, "", start=start)], config, Rates(16000, 25, (8, 8, 8)))
    reader.film = scenes.watch
    clips = [sample.video for sample in reader]
    shown = [(clip.mean(axis=(1, 2, 3)) - 40) / 40 for clip in clips]
    assert all(len(set(np.round(levels))) == 1 for levels in shown)
    held = {round(levels[0]) for levels in shown}
    fitting = {n for n, length in enumerate(LENGTHS) if (length - 1) / 25 * (fps or 25) >= 9}
    assert held >= fitting - ({0} if start else set())
    assert held <= {0, 1, 3, 4} or fps > 50
    assert all("scenes" in failure.reason for failure in reader.failures.values())


def test_a_scene_that_begins_early_begins_where_the_picture_before_is_no_longer_the_nearest():
    """Pictures 10 ms apart in a film of 25 a second: half of a period is 20 ms."""
    early = scenes.Film(((1.0, 1.01),), 2.0)
    (_, first), (begin, second) = early.scenes(0.0, 2.0, 25.0, 25.0)
    assert 1.02 < begin < 1.021
    assert (first, second) == (26, 24)


def test_films_are_watched_in_order_and_no_longer_than_anyone_waits(cut_film, tmp_path):
    missing = tmp_path / "none.mp4"
    seen = [round(found.end * 25) for found in scenes.watch_all([cut_film, missing, cut_film])]
    assert seen == [90, 0, 90]
    pictures = []

    def stops():
        pictures.append(1)
        if len(pictures) == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        list(scenes.watch_all([cut_film] * 3, stops))
    assert len(pictures) < 3 * 90


def test_without_scenes_a_clip_may_hold_a_cut(cut_film):
    config = PrepareConfig(9, 16, 16, stride=9)
    reader = ClipReader([Row("a", cut_film, "")], config, Rates(16000, 25, (8, 8, 8)))
    assert any(np.ptp(sample.video.mean(axis=(1, 2, 3))) > 20 for sample in reader)


def test_every_scene_takes_the_bucket_that_it_fills(cut_film):
    sizes = (Bucket(25, 16, 16), Bucket(17, 16, 16), Bucket(9, 16, 16))
    config = PrepareConfig(25, 16, 16, buckets=sizes, scenes=True)
    reader = ClipReader([Row("a", cut_film, "")], config, Rates(16000, 25, (8, 8, 8)))
    reader.film = scenes.watch
    samples = list(reader)
    assert [len(sample.video) for sample in samples] == [9, 25, 17, 25]
    assert [round(sample.item.start * 25) for sample in samples] == [0, 13, 47, 64]
    (failure,) = reader.failures.values()
    assert failure.reason == "of its 5 scenes 1 have less than 9 frames"
