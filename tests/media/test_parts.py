"""Parts of films, sound alone, and what files hold, against the whole film as it is read."""

import film
import numpy as np
import pytest

from ltx2_jax.errors import UserError
from ltx2_jax.media.media import Clip, TooShort, file_size, read_clip, read_sound


def pictures(count, height=32, width=48):
    levels = (np.arange(count) * 5 % 250).astype(np.uint8)
    return np.broadcast_to(levels[:, None, None, None], (count, height, width, 3)).copy()


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    path = tmp_path_factory.mktemp("parts") / "film.mp4"
    film.write_film(path, pictures(100), tones=[440], seconds=4.0, options={"g": "12"})
    return path


@pytest.mark.parametrize("start", [0.0, 0.04, 1.0, 2.36])
def test_a_part_is_the_part_of_the_whole(path, start):
    whole = read_clip(path, sample_rate=16000)
    part = read_clip(path, num_frames=17, sample_rate=16000, start=start)
    first = round(start * 25)
    np.testing.assert_array_equal(part.video, whole.video[first : first + 17])
    sound = whole.audio[round(start * 16000) :][: len(part.audio)]
    # Sound decoded from the middle, resampled without what lies before.
    np.testing.assert_allclose(part.audio[200:-200], sound[200:-200], atol=0.02)


def test_a_part_at_another_rate_begins_where_it_is_told(path):
    whole = read_clip(path, fps=12.5)
    part = read_clip(path, num_frames=9, fps=12.5, start=1.6)
    np.testing.assert_array_equal(part.video, whole.video[20:29])


def test_a_part_beyond_the_end_says_how_much_there_is(path):
    with pytest.raises(TooShort, match="17 frames wanted, but it has only 10") as caught:
        read_clip(path, num_frames=17, start=3.6)
    assert caught.value.frames == 10
    with pytest.raises(UserError, match="start must be seconds from 0 on, not -1"):
        read_clip(path, num_frames=17, start=-1)


def test_sound_is_read_of_films_and_of_sound_files(path, tmp_path):
    whole = read_clip(path, sample_rate=16000)
    sound, _ = read_sound(path, seconds=1.0, sample_rate=16000, start=1.0)
    np.testing.assert_allclose(sound[200:-200], whole.audio[16200:31800], atol=0.02)
    whole.save(tmp_path / "a.wav")
    sound, _ = read_sound(tmp_path / "a.wav", seconds=5.0, sample_rate=16000)
    np.testing.assert_allclose(sound[:64000], whole.audio[:64000], atol=1e-4)
    assert not sound[64000:].any()
    Clip(pictures(9), 25.0).save(tmp_path / "silent.mp4")
    with pytest.raises(UserError, match="the file has no sound"):
        read_sound(tmp_path / "silent.mp4", seconds=1.0, sample_rate=16000)


def test_the_sound_of_a_file_is_counted_from_its_first_sample(tmp_path):
    path = film.write_film(tmp_path / "a.ts", pictures(50), tones=[440])  # stamps from 1.4 s on
    for start, loud in ((0.0, 1.0), (1.5, 0.5)):
        sound, _ = read_sound(path, seconds=1.0, sample_rate=16000, start=start)
        heard = np.flatnonzero(np.abs(sound[:, 0]) > 0.1) / 16000
        assert heard[0] < 0.05
        assert heard[-1] == pytest.approx(loud, abs=0.05)


def test_what_a_file_holds_is_told_without_reading_it_all(path, tmp_path):
    size = file_size(path)
    assert (size.num_frames, size.height, size.width, size.fps) == (100, 32, 48, 25.0)
    assert size.seconds == pytest.approx(4.0)
    assert size.has_sound
    read_clip(path).save(tmp_path / "a.wav")
    size = file_size(tmp_path / "a.wav")
    assert (size.num_frames, size.has_sound) == (0, True)
    assert size.seconds == pytest.approx(4.0, abs=0.05)
    (tmp_path / "b.mp4").write_text("no film")
    with pytest.raises(UserError, match=r"b\.mp4: not a readable video file"):
        file_size(tmp_path / "b.mp4")


def test_an_image_is_a_film_of_one_frame(tmp_path):
    import matplotlib.image

    image = pictures(3)[2]
    matplotlib.image.imsave(tmp_path / "a.png", image)
    size = file_size(tmp_path / "a.png")
    assert (size.num_frames, size.height, size.width, size.has_sound) == (1, 32, 48, False)
    clip = read_clip(tmp_path / "a.png", num_frames=1, height=32, width=48)
    np.testing.assert_array_equal(clip.video[0], image)
    assert clip.audio is None
