"""What goes into a file comes out at the same place and time; what is wrong is said in one line."""

import base64
import contextlib
import fractions
import io
import os
import re
import unicodedata
import weakref

import av
import film
import numpy as np
import pytest
import soundfile
from av.stream import Disposition

from ltx2_jax.errors import UserError
from ltx2_jax.media import media, writing


def make_clip(num_frames=12, height=32, width=48, fps=12.0, sample_rate=16000, seed=0):
    """Frame k is a flat colour of its own; the sound is quiet noise."""
    rng = np.random.default_rng(seed)
    colours = np.linspace(20, 235, num_frames).round().astype(np.uint8)
    video = np.broadcast_to(colours[:, None, None, None], (num_frames, height, width, 3))
    samples = round(num_frames / fps * sample_rate)
    audio = rng.normal(0, 0.05, (samples, 2)).astype(np.float32)
    return media.Clip(video=video, fps=fps, audio=audio, sample_rate=sample_rate)


def write_raw(path, images, *, layout=None, audio=None, sample_rate=48000, rotation=None):
    """A file with lossless picture and sound, written without the code under test."""
    with av.open(str(path), "w") as container:
        video = container.add_stream("qtrle", rate=10)
        video.height, video.width = images[0].shape[:2]
        video.pix_fmt = "rgb24"
        if rotation is not None:
            video.set_display_rotation(rotation)
        if audio is not None:
            sound = container.add_stream("pcm_s16le", rate=sample_rate)
            sound.layout = layout
        for image in images:
            container.mux(video.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(video.encode())
        if audio is not None:
            data = np.ascontiguousarray((audio * 32767).astype(np.int16).reshape(1, -1))
            frame = av.AudioFrame.from_ndarray(data, format="s16", layout=layout)
            frame.sample_rate, frame.pts = sample_rate, 0
            frame.time_base = fractions.Fraction(1, sample_rate)
            container.mux(sound.encode(frame))
            container.mux(sound.encode())


@pytest.mark.parametrize("fps", [12.0, 24.0, 30000 / 1001])
def test_frame_k_comes_back_as_frame_k(tmp_path, fps):
    clip = make_clip(num_frames=23, fps=fps)
    media.write_mp4(tmp_path / "a.mp4", clip)
    back = media.read_clip(tmp_path / "a.mp4")
    assert back.video.shape == clip.video.shape
    assert back.fps == pytest.approx(fps, rel=1e-6)
    difference = np.abs(back.video.astype(int) - clip.video)
    assert difference.max() <= 4  # neighbouring frames are 10 levels apart


@pytest.mark.parametrize("sample_rate", [16000, 24000, 44100, 48000])
@pytest.mark.parametrize("read_rate", [None, 16000])
def test_a_click_stays_where_it_was_written(tmp_path, sample_rate, read_rate):
    clip = make_clip(num_frames=24, sample_rate=sample_rate)
    audio = np.zeros_like(clip.audio)
    times = (0.25, 1.0, 1.75)
    for time in times:
        audio[round(time * sample_rate)] = 0.9
    media.write_mp4(tmp_path / "a.mp4", media.Clip(clip.video, clip.fps, audio, sample_rate))
    back = media.read_clip(tmp_path / "a.mp4", sample_rate=read_rate)
    assert back.sample_rate == (read_rate or sample_rate)
    assert back.audio.shape == (round(2.0 * back.sample_rate), 2)
    for time in times:
        begin = round((time - 0.2) * back.sample_rate)
        window = np.abs(back.audio[begin : round((time + 0.2) * back.sample_rate), 0])
        assert abs((begin + window.argmax()) / back.sample_rate - time) < 0.003


def test_saturated_colours_survive_the_round_trip(tmp_path):
    colours = np.array([[230, 40, 40], [40, 200, 60], [40, 70, 230], [240, 220, 40]], np.uint8)
    video = np.broadcast_to(colours[:, None, None], (4, 32, 32, 3))
    media.write_mp4(tmp_path / "a.mp4", media.Clip(video, 4.0))
    back = media.read_clip(tmp_path / "a.mp4").video[:, 8:24, 8:24]
    assert np.abs(back.astype(int) - video[:, 8:24, 8:24]).max() <= 5


def test_sound_has_exactly_the_length_of_the_picture(tmp_path):
    clip = make_clip(num_frames=25)
    longer = np.concatenate([clip.audio, clip.audio])
    media.write_mp4(tmp_path / "long.mp4", media.Clip(clip.video, clip.fps, longer))
    media.write_mp4(tmp_path / "short.mp4", media.Clip(clip.video, clip.fps, clip.audio[:9000]))
    for name in ("long", "short"):
        back = media.read_clip(tmp_path / f"{name}.mp4", num_frames=25, sample_rate=16000)
        assert back.audio.shape == (round(25 / 12 * 16000), 2)
        assert back.duration == pytest.approx(25 / 12)
    assert not back.audio[9000 + 2048 :].any()
    assert media.read_clip(tmp_path / "long.mp4", num_frames=9).audio.shape == (12000, 2)


def test_a_file_without_sound_reads_as_none(tmp_path):
    clip = make_clip()
    media.Clip(clip.video, clip.fps).save(tmp_path / "a.mp4")
    assert media.read_clip(tmp_path / "a.mp4", sample_rate=16000).audio is None


def test_mono_is_duplicated(tmp_path):
    clip = make_clip()
    media.write_mp4(tmp_path / "a.mp4", media.Clip(clip.video, clip.fps, clip.audio[:, :1]))
    audio = media.read_clip(tmp_path / "a.mp4").audio
    assert audio.shape[1] == 2
    assert audio.any()
    np.testing.assert_array_equal(audio[:, 0], audio[:, 1])


@pytest.mark.parametrize(
    ("layout", "left", "right"),
    [
        ("5.1", [1, 0, 0.707, 0, 0.707, 0], [0, 1, 0.707, 0, 0, 0.707]),
        ("7.1", [1, 0, 0.707, 0, 0.707, 0, 0.707, 0], [0, 1, 0.707, 0, 0, 0.707, 0, 0.707]),
        ("quad", [1, 1, 1, 1], [1, 1, 1, 1]),
    ],
)
def test_surround_down_mix(tmp_path, layout, left, right):
    """Every channel carries its own constant level, so the mix is a dot product."""
    levels = np.linspace(0.1, 0.8, len(left))
    audio = np.broadcast_to(levels, (24000, len(left)))
    images = [np.zeros((16, 16, 3), np.uint8)] * 5
    write_raw(tmp_path / "a.mov", images, layout=layout, audio=audio)
    got = media.read_clip(tmp_path / "a.mov").audio
    norm = {"5.1": 2.414, "7.1": 3.121, "quad": 4.0}[layout]
    expected = [levels @ np.array(row) / norm for row in (left, right)]
    np.testing.assert_allclose(got, np.broadcast_to(expected, got.shape), atol=2e-3)


@pytest.mark.parametrize("source_rate", [44100, 48000])
@pytest.mark.parametrize("layout", ["mono", "stereo", "5.1", "7.1"])
def test_sound_of_any_rate_and_layout_becomes_16_khz_stereo(tmp_path, source_rate, layout):
    """Every channel carries its own tone; the mix has them in step and as loud as they should be.

    The gains are those of the official preprocessing, here by hand.
    """
    gains = {
        "mono": [[1.0], [1.0]],
        "stereo": [[1, 0], [0, 1]],
        "5.1": np.array([[1, 0, 0.707, 0, 0.707, 0], [0, 1, 0.707, 0, 0, 0.707]]) / 2.414,
        "7.1": np.array([[1, 0, 0.707, 0, 0.707, 0, 0.707, 0],
                         [0, 1, 0.707, 0, 0, 0.707, 0, 0.707]]) / 3.121,
    }[layout]  # fmt: skip
    pitches = 300.0 * np.arange(1, 1 + len(gains[0]))

    def tones(rate):
        return 0.5 * np.sin(2 * np.pi * pitches * np.arange(rate // 2)[:, None] / rate)

    images = [np.zeros((16, 16, 3), np.uint8)] * 5
    audio = tones(source_rate)
    write_raw(tmp_path / "a.mov", images, layout=layout, audio=audio, sample_rate=source_rate)
    clip = media.read_clip(tmp_path / "a.mov", sample_rate=16000)
    assert (clip.audio.shape, clip.sample_rate) == ((8000, 2), 16000)
    expected = tones(16000) @ np.transpose(gains)
    np.testing.assert_allclose(clip.audio[50:-50], expected[50:-50], atol=2e-3)


def test_six_or_eight_channels_without_names_are_surround():
    audio = np.random.default_rng(0).normal(size=(5, 8)).astype(np.float32)
    for channels, name in ((6, "5.1"), (8, "7.1")):
        unnamed = audio[:, :channels]
        for layout in ("", f"{channels} channels", f"{name}(side)"):
            mixed = media.to_stereo(unnamed, layout)
            np.testing.assert_array_equal(mixed, media.to_stereo(unnamed, name))
    mean = np.repeat(audio[:, :6].mean(axis=1, keepdims=True), 2, axis=1)
    np.testing.assert_allclose(media.to_stereo(audio[:, :6], "hexagonal"), mean, rtol=1e-6)


def test_resize_covers_and_crops_the_centre(tmp_path):
    """A wide picture with a white middle square: asked for a square, only the middle remains."""
    image = np.zeros((32, 96, 3), np.uint8)
    image[:, 32:64] = 255
    write_raw(tmp_path / "a.mov", [image] * 3)
    video = media.read_clip(tmp_path / "a.mov", height=64, width=64).video
    assert video.shape == (3, 64, 64, 3)
    assert (video[:, :, 4:-4] > 250).all()
    tall = media.read_clip(tmp_path / "a.mov", height=16, width=48).video
    assert (tall[:, :, :13] < 5).all()
    assert (tall[:, :, 19:29] > 250).all()


def test_a_rotated_phone_video_is_upright(tmp_path):
    image = np.zeros((16, 32, 3), np.uint8)
    image[:, :8] = (255, 0, 0)
    if not hasattr(av.VideoStream, "set_display_rotation"):
        pytest.skip("this PyAV cannot write a rotation")
    write_raw(tmp_path / "a.mov", [image] * 2, rotation=90)  # counter-clockwise
    video = media.read_clip(tmp_path / "a.mov").video
    assert video.shape == (2, 32, 16, 3)
    np.testing.assert_array_equal(video[0], np.rot90(image))
    assert media.read_clip(tmp_path / "a.mov", height=32, width=16).video[0, -4, 8, 0] > 200


def test_a_turned_picture_covers_its_size_with_all_of_itself(tmp_path):
    """Red grows along its rows, green along its columns; half as large, nothing is cut off."""
    rows, columns = np.mgrid[0:64, 0:96]
    image = np.stack([2 * columns, 3 * rows, 0 * rows], -1).astype(np.uint8)
    path = film.write_film(tmp_path / "a.mp4", np.stack([image] * 2))
    film.set_display_matrix(path, 0, 1, -1, 0)
    video = media.read_clip(path, height=48, width=32).video[0].astype(int)
    assert abs(video[0, 16, 0] - video[-1, 16, 0]) > 170
    assert abs(video[24, 0, 1] - video[24, -1, 1]) > 170


TURNS = [(1, 0, 0, 1), (0, 1, -1, 0), (-1, 0, 0, -1), (0, -1, 1, 0)]
MIRRORED = [(-1, 0, 0, 1), (1, 0, 0, -1), (0, 1, 1, 0), (0, -1, -1, 0)]


@pytest.mark.parametrize("rows", TURNS + MIRRORED)
def test_turned_and_mirrored_pictures_are_as_they_are_meant(tmp_path, rows):
    """The matrix puts (x, y) to (a x + c y, b x + d y); here corner by corner."""
    film.write_film(tmp_path / "a.mp4", film.quadrants())
    film.set_display_matrix(tmp_path / "a.mp4", *rows)
    a, b, c, d = rows
    wanted = [None] * 4
    for index in range(4):
        y, x = (2 * (index // 2) - 1), (2 * (index % 2) - 1)
        wanted[(b * x + d * y > 0) * 2 + (a * x + c * y > 0)] = index
    whole = media.read_clip(tmp_path / "a.mp4").video
    assert whole.shape == ((3, 64, 96, 3) if a else (3, 96, 64, 3))
    scaled = media.read_clip(tmp_path / "a.mp4", height=40, width=60).video
    assert scaled.shape == (3, 40, 60, 3)
    assert film.corners(whole[1]) == film.corners(scaled[1]) == wanted


@pytest.mark.parametrize(("wide", "high", "shown"), [(4, 3, 128), (8, 9, 86), (64, 45, 136)])
@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".ts"])
def test_pixels_that_are_not_square_are_made_square(tmp_path, suffix, wide, high, shown):
    y, x = np.mgrid[0:96, 0:96] - 47.5
    circle = np.hypot(x * wide / high, y) < 36
    images = np.broadcast_to(circle[..., None] * np.uint8(255), (3, 96, 96, 3))
    tags = {"sample_aspect_ratio": fractions.Fraction(wide, high)}
    path = film.write_film(tmp_path / f"a{suffix}", images, tags=tags)
    assert media.read_clip(path).video.shape == (3, 96, shown, 3)
    assert (media.file_size(path).height, media.file_size(path).width) == (96, shown)
    for video in (media.read_clip(path).video, media.read_clip(path, height=80, width=64).video):
        rows, columns = np.nonzero(video[1, :, :, 0] > 128)
        assert abs(np.ptp(rows) - np.ptp(columns)) <= 3


def test_a_turned_picture_has_its_pixels_turned_too(tmp_path):
    tags = {"sample_aspect_ratio": fractions.Fraction(2)}
    film.write_film(tmp_path / "a.mp4", film.quadrants(), tags=tags)
    film.set_display_matrix(tmp_path / "a.mp4", 0, 1, -1, 0)
    assert media.read_clip(tmp_path / "a.mp4").video.shape[1:3] == (192, 64)
    size = media.file_size(tmp_path / "a.mp4")  # by which its bucket is chosen
    assert (size.height, size.width) == (192, 64)


@pytest.mark.parametrize("first", ["top", "bottom"])
@pytest.mark.parametrize(("codec", "suffix"), [("libx264", ".mp4"), ("mpeg2video", ".ts")])
def test_interlaced_fields_become_whole_pictures(tmp_path, codec, suffix, first):
    """A bar moves between the fields of a frame: woven together, they would be a comb."""

    def bar(time):
        image = np.full((64, 192, 3), (40, 60, 90), np.uint8)
        image[:, 8 + 6 * time :][:, :24] = (200, 180, 90)
        return image

    graph = av.filter.Graph()
    ends = graph.add_buffer(
        width=192, height=64, format="yuv420p", time_base=fractions.Fraction(1, 25)
    )
    mark = graph.add("setfield", {"top": "tff", "bottom": "bff"}[first])
    graph.link_nodes(ends, mark, graph.add("buffersink")).configure()
    frames = []
    for index in range(12):
        woven, second = bar(2 * index), bar(2 * index + 1)
        lines = slice(1 if first == "top" else 0, None, 2)
        woven[lines] = second[lines]
        frame = av.VideoFrame.from_ndarray(woven, format="rgb24")
        to = {"dst_colorspace": "ITU601", "dst_color_range": "MPEG"}
        frame = frame.reformat(format="yuv420p", **to)
        frame.pts, frame.time_base = index, fractions.Fraction(1, 25)
        graph.vpush(frame)
        frames.append(graph.vpull())
    options = {"flags": "+ildct+ilme", "qmin": "1", "b": "8000000"}
    tags = {"colorspace": 5, "color_range": 1}
    path = film.write_film(tmp_path / f"a{suffix}", frames, codec=codec, options=options, tags=tags)
    for fps, every in ((None, 1), (12.5, 2)):
        clip = media.read_clip(path, fps=fps)
        assert len(clip.video) == 12 // every
        assert clip.notes == (media.DEINTERLACED,)
        image = clip.video[4 // every].astype(int)
        assert np.abs(np.diff(image[4:-4, :, 0], axis=0)).mean() < 1  # woven: 11
        begin, end = np.flatnonzero(image[32, :, 0] > 120)[[0, -1]]
        assert abs(begin - (8 + 6 * 8)) <= 1  # as in the field that comes first
        assert abs(end - begin - 23) <= 2
        np.testing.assert_allclose(image[32, 160], (40, 60, 90), atol=6)


# ---- which track is the film -----------------------------------------------------------------


def test_the_default_track_and_no_commentary_is_heard(tmp_path):
    plain, asides = Disposition(0), (Disposition.comment, Disposition.visual_impaired)
    for aside in (*asides, Disposition.hearing_impaired, Disposition.default | Disposition.comment):
        for tracks in ((aside, Disposition.default), (Disposition.default, aside), (aside, plain)):
            path = film.write_film(
                tmp_path / "a.mkv", film.plain(90, 25), tones=(440, 2000), dispositions=tracks
            )
            clip = media.read_clip(path, sample_rate=16000)
            film_is = 440 if tracks[0] == Disposition.default else 2000
            assert film.tone_of(clip.audio, 16000) == pytest.approx(film_is, abs=5)
    only = film.write_film(
        tmp_path / "b.mkv", film.plain(90), tones=(440,), dispositions=(Disposition.comment,)
    )
    assert media.read_clip(only).audio.any()


@pytest.mark.parametrize("disposition", [0, Disposition.default, Disposition.attached_pic])
@pytest.mark.parametrize("suffix", [".mkv", ".mp4"])
def test_a_cover_is_not_the_picture(tmp_path, suffix, disposition):
    path = tmp_path / f"a{suffix}"
    with av.open(str(path), "w") as container:
        cover = container.add_stream("mjpeg", rate=1)
        cover.width, cover.height, cover.pix_fmt = 32, 32, "yuvj420p"
        cover.disposition = Disposition(disposition)
        picture = container.add_stream("libx264", rate=10)
        picture.width, picture.height, picture.pix_fmt = 96, 64, "yuv420p"
        for stream, images in ((cover, [np.full((32, 32, 3), 99)]), (picture, film.numbered(9))):
            for image in images:
                container.mux(stream.encode(film.as_frame(image.astype(np.uint8))))
            container.mux(stream.encode())
    video = media.read_clip(path).video
    assert [film.number(image) for image in video] == list(range(9))


def test_sound_with_a_cover_is_no_film(tmp_path):
    with av.open(str(tmp_path / "a.mp4"), "w") as container:
        cover = container.add_stream("mjpeg", rate=1)
        cover.width, cover.height, cover.pix_fmt = 32, 32, "yuvj420p"
        cover.disposition = Disposition.attached_pic
        container.mux(cover.encode(film.as_frame(np.zeros((32, 32, 3), np.uint8))))
        container.mux(cover.encode())
    with pytest.raises(UserError, match=r"a\.mp4: the file has no video stream but its cover"):
        media.read_clip(tmp_path / "a.mp4")


# ---- names ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        *("10:30.mp4", "-y.mp4", "a%03d.mp4", "what?.mp4", "a#b.mp4", "file:a.mp4", "http:a.mp4"),
        *("concat:a|b.mp4", " a .mp4", 'it\'s "a".mp4', "日本.mp4", "pipe:1.mp4"),
    ],
)
def test_a_file_may_have_any_name(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    clip = make_clip()
    media.write_mp4(name, clip)
    assert os.listdir() == [name]
    assert len(media.read_clip(name).video) == len(clip.video)
    assert len(media.read_clip(tmp_path / name).video) == len(clip.video)


def test_a_wav_may_have_any_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("-", "10:30.wav", "a%d?#.wav"):
        media.write_wav(name, make_clip().audio, 16000)
        assert len(media.read_wav(name)[0]) == 16000


def test_names_are_found_in_either_unicode_spelling(tmp_path):
    composed, decomposed = (unicodedata.normalize(form, "clés/café.mp4") for form in ("NFC", "NFD"))
    for there, asked in ((composed, decomposed), (decomposed, composed)):
        media.write_mp4(tmp_path / there, make_clip())
        assert len(media.read_clip(tmp_path / asked).video) == 12
        (tmp_path / there).unlink()
        (tmp_path / there).parent.rmdir()
        with pytest.raises(UserError, match="no such file"):
            media.read_clip(tmp_path / asked)


def test_fps_selects_the_nearest_frame_in_time(tmp_path):
    clip = make_clip(num_frames=24, fps=24.0)
    media.write_mp4(tmp_path / "a.mp4", clip)
    back = media.read_clip(tmp_path / "a.mp4", fps=10.0)
    assert back.fps == 10.0
    assert len(back.video) == 10
    assert back.audio.shape == (16000, 2)
    # The times k / 10 never fall in the middle of two frames of 24, except at k = 5 m + 2.5.
    expected = [round(k * 2.4) for k in range(10)]
    got = [
        int(np.abs(clip.video[:, 0, 0, 0].astype(int) - f[8, 8, 0]).argmin()) for f in back.video
    ]
    assert got == expected
    assert len(media.read_clip(tmp_path / "a.mp4", fps=48.0).video) == 48
    assert len(media.read_clip(tmp_path / "a.mp4", fps=48.0, num_frames=7).video) == 7
    with pytest.raises(UserError, match="only 10 at 10 fps"):
        media.read_clip(tmp_path / "a.mp4", fps=10.0, num_frames=11)


def test_wav_round_trip_and_resampling(tmp_path):
    audio = make_clip().audio
    media.write_wav(tmp_path / "a.wav", audio, 16000)
    back, rate = media.read_wav(tmp_path / "a.wav")
    assert rate == 16000
    np.testing.assert_allclose(back, audio, atol=1 / 32768)
    half, rate = media.read_wav(tmp_path / "a.wav", sample_rate=8000)
    assert (half.shape, rate) == ((8000, 2), 8000)
    media.Clip(make_clip().video, 12.0, audio).save(tmp_path / "b.wav")
    assert soundfile.info(tmp_path / "b.wav").frames == len(audio)


def test_a_clip_shows_itself_in_a_notebook(tmp_path, monkeypatch):
    clip = make_clip()
    page = clip._repr_html_()
    assert page.startswith("<video controls")
    (data,) = re.findall(r'src="data:video/mp4;base64,([^"]*)"', page)
    (tmp_path / "shown.mp4").write_bytes(base64.b64decode(data, validate=True))
    clip.save(tmp_path / "saved.mp4")
    shown, saved = (media.read_clip(tmp_path / f"{name}.mp4") for name in ("shown", "saved"))
    np.testing.assert_array_equal(shown.video, saved.video)
    np.testing.assert_array_equal(shown.audio, saved.audio)
    assert abs(shown.video.astype(int) - clip.video).mean() < 12
    monkeypatch.setattr(writing, "SHOWN_BYTES", 100)
    assert "too many to show" in clip._repr_html_()
    assert len(clip._repr_html_()) < 300


def test_a_sound_alone_shows_itself_in_a_notebook():
    sound = media.Clip(np.zeros((0, 0, 0, 3), np.uint8), 12.0, make_clip().audio, 16000)
    (data,) = re.findall(r'<audio .*src="data:audio/wav;base64,([^"]*)"', sound._repr_html_())
    samples, rate = soundfile.read(io.BytesIO(base64.b64decode(data)), dtype="float32")
    assert rate == 16000
    np.testing.assert_allclose(samples, sound.audio, atol=1 / 32768)
    nothing = media.Clip(np.zeros((0, 0, 0, 3), np.uint8), 12.0)
    assert nothing._repr_html_() == "<p>an empty clip</p>"


def test_unreadable_files_are_named(tmp_path):
    with pytest.raises(UserError, match=r"nowhere\.mp4: no such file"):
        media.read_clip(tmp_path / "nowhere.mp4")
    (tmp_path / "bad.mp4").write_bytes(b"not a film" * 100)
    with pytest.raises(UserError, match=r"bad\.mp4: not a readable video") as caught:
        media.read_clip(tmp_path / "bad.mp4")
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="is a folder"):
        media.read_clip(tmp_path)
    media.write_wav(tmp_path / "sound.wav", np.zeros((800, 2)), 16000)
    with pytest.raises(UserError, match=r"sound\.wav: the file has no video stream"):
        media.read_clip(tmp_path / "sound.wav")
    with pytest.raises(UserError, match=r"bad\.mp4: not a readable sound"):
        media.read_wav(tmp_path / "bad.mp4")
    with pytest.raises(UserError, match=r"none\.wav: no such file"):
        media.read_wav(tmp_path / "none.wav")


def write_encoded(path, *, codec="mpeg4", sound=None, title=None, stamps=range(12)):
    """A small file at 10 frames per second, frame k at stamps[k] / 10; `sound` is a layout."""
    with av.open(str(path), "w") as container:
        if title:
            container.metadata["title"] = title
        video = container.add_stream(codec, rate=10)
        video.width, video.height, video.pix_fmt = 32, 32, "yuv420p"
        track = container.add_stream("mp2", rate=16000, layout=sound) if sound else None
        for stamp in stamps:
            frame = av.VideoFrame.from_ndarray(np.zeros((32, 32, 3), np.uint8), format="rgb24")
            frame.pts, frame.time_base = stamp, fractions.Fraction(1, 10)
            container.mux(video.encode(frame))
        container.mux(video.encode())
        if track:
            channels = 1 if sound == "mono" else 2
            frame = writing._audio_frame(np.zeros((16000, channels), np.float32), 16000)
            frame = av.AudioResampler("s16", layout=sound).resample(frame)[0]
            container.mux(track.encode(frame))
            container.mux(track.encode())


def test_metadata_in_another_encoding_does_not_matter(tmp_path):
    write_encoded(tmp_path / "a.avi", title="café!")
    content = (tmp_path / "a.avi").read_bytes()
    (tmp_path / "a.avi").write_bytes(content.replace("café!".encode(), b"caf\xe9! "))
    assert b"caf\xe9!" in (tmp_path / "a.avi").read_bytes()
    assert len(media.read_clip(tmp_path / "a.avi").video) == 12


def test_whatever_is_wrong_with_a_file_names_the_file(tmp_path):
    for layout in ("mono", "stereo"):
        write_encoded(tmp_path / f"{layout}.ts", sound=layout)
    parts = [(tmp_path / f"{layout}.ts").read_bytes() for layout in ("mono", "stereo")]
    (tmp_path / "both.ts").write_bytes(b"".join(parts))
    with pytest.raises(UserError, match=r"both\.ts: not a readable video file"):
        media.read_clip(tmp_path / "both.ts", fps=10.0, num_frames=12)
    with pytest.raises(UserError, match=r"nn\.mp4: not a readable video file \(File name too long"):
        media.read_clip(tmp_path / f"{'n' * 300}.mp4")


def test_frames_that_leave_the_stated_rate_need_a_rate_to_resample_to(tmp_path):
    write_encoded(tmp_path / "a.mkv", stamps=[0, 1, 2, 3, 5, 6, 9, 10])
    with pytest.raises(UserError, match=r"a\.mkv: .* number \d is at \d\.\d+ s, .*\(--fps\)"):
        media.read_clip(tmp_path / "a.mkv")
    assert len(media.read_clip(tmp_path / "a.mkv", fps=10.0).video) == 11


def test_short_and_empty_videos_are_refused(tmp_path):
    media.write_mp4(tmp_path / "a.mp4", make_clip(num_frames=12))
    with pytest.raises(UserError, match=r"a\.mp4: 25 frames wanted, but it has only 12"):
        media.read_clip(tmp_path / "a.mp4", num_frames=25)
    whole = (tmp_path / "a.mp4").read_bytes()
    (tmp_path / "cut.mp4").write_bytes(whole[: len(whole) // 4])
    with pytest.raises(UserError, match=r"cut\.mp4: "):
        media.read_clip(tmp_path / "cut.mp4", num_frames=12)
    with av.open(str(tmp_path / "empty.mkv"), "w") as container:
        video = container.add_stream("libx264", rate=10)
        video.height, video.width, video.pix_fmt = 16, 16, "yuv420p"
        sound = container.add_stream("aac", rate=16000)
        sound.layout = "mono"
        container.mux(sound.encode(writing._audio_frame(np.zeros((4800, 1)), 16000)))
        container.mux(sound.encode())
    with pytest.raises(UserError, match=r"empty\.mkv: the video stream has no frames"):
        media.read_clip(tmp_path / "empty.mkv")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"video": np.zeros((2, 31, 32, 3), np.uint8)}, "height 31 x width 32"),
        ({"video": np.zeros((0, 32, 32, 3), np.uint8)}, "no pictures"),
        ({"video": np.zeros((2, 32, 32, 3), np.float32)}, "uint8"),
        ({"audio": np.full((100, 2), np.nan, np.float32)}, "NaN"),
        ({"audio": np.zeros((100, 3), np.float32)}, r"\[samples, 1 or 2\]"),
        ({"sample_rate": 11000}, "AAC has no sample rate 11000"),
        ({"fps": 0.0}, "fps must be positive"),
    ],
)
def test_what_mp4_cannot_hold_is_refused_by_name(tmp_path, change, message):
    fields = {"video": make_clip().video, "fps": 12.0, "audio": np.zeros((100, 2), np.float32)}
    with pytest.raises(UserError, match=message):
        media.write_mp4(tmp_path / "a.mp4", media.Clip(**(fields | change)))
    assert os.listdir(tmp_path) == []


def test_a_failed_write_leaves_the_old_file_alone(tmp_path):
    path = tmp_path / "a.mp4"
    media.write_mp4(path, make_clip())
    before = path.read_bytes()
    with pytest.raises(UserError):
        media.write_mp4(path, media.Clip(np.zeros((2, 3, 3, 3), np.uint8), 12.0))
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["a.mp4"]
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot be written"):
        media.write_mp4(tmp_path / "file" / "a.mp4", make_clip())
    with pytest.raises(UserError, match=r"use \.mp4 or \.wav"):
        make_clip().save(tmp_path / "a.gif")


def test_libav_is_quiet(tmp_path, capfd):
    media.write_mp4(tmp_path / "a.mp4", make_clip())
    media.read_clip(tmp_path / "a.mp4")
    whole = (tmp_path / "a.mp4").read_bytes()
    (tmp_path / "cut.mp4").write_bytes(whole[:-400])
    with contextlib.suppress(UserError):
        media.read_clip(tmp_path / "cut.mp4", num_frames=12)
    assert capfd.readouterr() == ("", "")


def test_a_clip_that_arrives_in_pieces_is_the_same_file(tmp_path):
    clip = make_clip(num_frames=7)
    pieces = [clip.video[:0], clip.video[:3], clip.video[3:4], clip.video[4:4], clip.video[4:]]
    sound = {"audio": clip.audio, "sample_rate": clip.sample_rate}
    media.write_mp4(tmp_path / "whole.mp4", clip)
    media.stream_mp4(tmp_path / "pieces.mp4", iter(pieces), fps=clip.fps, **sound)
    film.assert_same(tmp_path / "whole.mp4", tmp_path / "pieces.mp4")


def test_a_film_says_that_its_colours_are_those_of_bt709(tmp_path):
    media.write_mp4(tmp_path / "a.mp4", make_clip(num_frames=2))
    with av.open(str(tmp_path / "a.mp4")) as container:
        context = container.streams.video[0].codec_context
        names = ("colorspace", "color_primaries", "color_trc", "color_range")
        assert [int(getattr(context, name)) for name in names] == [1, 1, 1, 1]


def test_a_film_has_the_quality_that_is_asked_for_and_its_index_in_front(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (3, 32, 48, 3)).astype(np.uint8)
    sizes = []
    for crf in (10, 40):
        media.write_mp4(tmp_path / "whole.mp4", media.Clip(noise, 12.0), crf=crf)
        media.stream_mp4(tmp_path / "pieces.mp4", iter([noise]), fps=12.0, crf=crf)
        for name in ("whole", "pieces"):
            data = (tmp_path / f"{name}.mp4").read_bytes()
            assert data.index(b"moov") < data.index(b"mdat")
            sizes.append(len(data))
    assert min(sizes[:2]) > 2 * max(sizes[2:])


def test_sound_beyond_full_scale_is_cut_off_there(tmp_path):
    clip = make_clip()
    loud = 40 * clip.audio  # up to 8
    for name, audio in (("loud", loud), ("cut", np.clip(loud, -1, 1))):
        for suffix in (".mp4", ".wav"):
            media.Clip(clip.video, 12.0, audio).save(tmp_path / f"{name}{suffix}")
    film.assert_same(tmp_path / "loud.mp4", tmp_path / "cut.mp4")
    assert (tmp_path / "loud.wav").read_bytes() == (tmp_path / "cut.wav").read_bytes()


def test_pieces_are_asked_for_one_by_one_and_let_go(tmp_path):
    alive = []

    def pieces():
        for index in range(4):
            piece = np.full((2, 16, 16, 3), 40 * index, np.uint8)
            alive.append(weakref.ref(piece))
            yield piece
            del piece
            assert sum(ref() is not None for ref in alive) <= 2

    media.stream_mp4(tmp_path / "a.mp4", pieces(), fps=8.0)
    assert len(media.read_clip(tmp_path / "a.mp4").video) == 8


def test_a_stream_that_breaks_off_leaves_no_file(tmp_path):
    def pieces():
        yield np.zeros((2, 16, 16, 3), np.uint8)
        raise RuntimeError("decoder")

    with pytest.raises(RuntimeError, match="decoder"):
        media.stream_mp4(tmp_path / "a.mp4", pieces(), fps=8.0)
    with pytest.raises(UserError, match="no pictures"):
        media.stream_mp4(tmp_path / "a.mp4", iter([]), fps=8.0)
    assert list(tmp_path.iterdir()) == []
