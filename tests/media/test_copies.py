"""Films in a bucket are read as those on a disk, from copies that do not stay."""

import tempfile
from concurrent.futures import ThreadPoolExecutor

import fake_bucket
import film
import numpy as np
import pytest

from ltx2_jax.data.table import read_table
from ltx2_jax.errors import UserError
from ltx2_jax.files import is_passing
from ltx2_jax.media import copies
from ltx2_jax.media.clip_files import fingerprints
from ltx2_jax.media.copies import kept, placed
from ltx2_jax.media.media import file_size, read_clip, read_wav, write_wav
from ltx2_jax.media.scenes import watch

URL = "gs://bucket/films/a.mp4"


@pytest.fixture
def bucket(monkeypatch, tmp_path):
    yield from fake_bucket.serve(monkeypatch)


@pytest.fixture
def local(tmp_path, bucket):
    """A film, also as two in the bucket."""
    film.write_film(tmp_path / "a.mp4", film.numbered(), tones=[440])
    for name in "ab":
        bucket.put(f"bucket/films/{name}.mp4", (tmp_path / "a.mp4").read_bytes())
    return tmp_path / "a.mp4"


@pytest.fixture
def fetched(monkeypatch, tmp_path):
    """What is copied, by name; nothing may be left."""
    names, download = [], copies.download

    def noted(place, target):
        names.append(place.name)
        try:
            download(place, target)
        except FileNotFoundError:  # gcsfs removes what it could not write
            target.unlink()
            raise

    (tmp_path / "scratch").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "scratch"))
    monkeypatch.setattr(copies, "download", noted)
    with kept():
        yield names
    assert not list((tmp_path / "scratch").iterdir())


def test_a_film_in_a_bucket_is_read_as_on_a_disk_and_copied_once(local, fetched):
    there, here = read_clip(URL, num_frames=5), read_clip(local, num_frames=5)
    np.testing.assert_array_equal(there.video, here.video)
    np.testing.assert_array_equal(there.audio, here.audio)
    with ThreadPoolExecutor(4) as pool:
        assert set(pool.map(file_size, [URL] * 8)) == {file_size(local)}
    assert watch(placed(URL)) == watch(local)
    assert fingerprints([placed(URL), placed(URL + ".no")]) == [*fingerprints([local]), None]
    assert fetched == ["a.mp4"]


def test_a_sound_in_a_bucket_too(tmp_path, bucket, fetched):
    write_wav(tmp_path / "a.wav", np.linspace(-1, 1, 800, dtype=np.float32)[:, None], 8000)
    bucket.put("bucket/a.wav", (tmp_path / "a.wav").read_bytes())
    np.testing.assert_array_equal(read_wav("gs://bucket/a.wav")[0], read_wav(tmp_path / "a.wav")[0])


def test_copies_that_nobody_reads_make_room(local, fetched, monkeypatch):
    monkeypatch.setattr(copies, "ROOM", local.stat().st_size)
    for name in "abba":
        file_size(URL.replace("a.mp4", f"{name}.mp4"))
    assert fetched == ["a.mp4", "b.mp4", "a.mp4"]


def test_the_copy_that_was_asked_for_the_longest_ago_goes_first(
    local, bucket, fetched, monkeypatch
):
    monkeypatch.setattr(copies, "ROOM", 2 * local.stat().st_size)
    bucket.put("bucket/films/c.mp4", local.read_bytes())
    for name in "abacab":
        file_size(URL.replace("a.mp4", f"{name}.mp4"))
    assert fetched == ["a.mp4", "b.mp4", "c.mp4", "b.mp4"]


def test_a_copy_stays_as_long_as_it_is_read(local, fetched, monkeypatch):
    monkeypatch.setattr(copies, "ROOM", 0)
    with copies.copied(placed(URL)) as file:
        file_size(URL.replace("a.mp4", "b.mp4"))
        assert file.exists()
    assert not file.exists()


def test_a_film_that_cannot_be_copied_is_one_line_and_may_be_later(local, bucket, fetched):
    with pytest.raises(UserError, match=r"^gs://bucket/films/none.mp4: no such file$") as caught:
        file_size("gs://bucket/films/none.mp4")
    assert not is_passing(caught.value)
    bucket.refuse = ConnectionError("503: later")
    with pytest.raises(UserError, match=rf"^{URL}: cannot be copied \(503: later\)$") as caught:
        read_clip(URL)
    assert is_passing(caught.value)
    found = watch(placed(URL))
    assert (found.fault, found.passing) == ("cannot be copied (503: later)", True)
    bucket.refuse = None
    assert file_size(URL) == file_size(local)


def test_a_table_names_films_in_its_bucket_and_in_others(tmp_path, bucket):
    table = "video,caption\nsub/a.mp4,one\ngs://other/b.mp4,two\n"
    bucket.put("bucket/films/t.csv", table.encode())
    (tmp_path / "t.csv").write_text(table)
    paths = [str(row.path) for row in read_table("gs://bucket/films/t.csv")]
    assert paths == ["gs://bucket/films/sub/a.mp4", "gs://other/b.mp4"]
    paths = [str(row.path) for row in read_table(tmp_path / "t.csv")]
    assert paths == [str(tmp_path / "sub" / "a.mp4"), "gs://other/b.mp4"]
    with pytest.raises(UserError, match=r"^gs://bucket/films/no.csv: no such table$"):
        read_table("gs://bucket/films/no.csv")
    bucket.refuse = LookupError("403")
    with pytest.raises(UserError, match=r"^gs://.*/t.csv: cannot read the table: 403$"):
        read_table("gs://bucket/films/t.csv")
