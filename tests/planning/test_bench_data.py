"""bench data measures what prepare and the loader do; nothing about its times is claimed."""

import film
import numpy as np
import pytest

from ltx2_jax import bench
from ltx2_jax.data.records import RecordWriter
from ltx2_jax.data.schema import Field, Schema


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("films")
    for name in "ab":
        film.write_film(folder / f"{name}.mp4", film.numbered(10, 32, 32), tones=[440])
    (folder / "bad.mp4").write_text("no film")
    record = {"id": np.int64(0), "video": np.zeros((3, 4), np.float32), "fps": np.float32(24)}
    words = ["release", "text", "text_release", "codec", "codec_hash"]
    schema = Schema(
        **dict.fromkeys([*words, "text_encoder", "text_encoder_hash"], ""),
        **dict.fromkeys(["num_frames", "height", "width", "fps"], 1),
        fields={name: Field.of(value) for name, value in record.items()},
    )
    with RecordWriter(folder / "set") as writer:
        writer.start(schema)
        for index in range(10):
            writer.write(record | {"id": np.int64(index)})
    return folder


def test_a_line_for_films_and_lines_for_records(folder, capsys):
    size = ["--frames=9", "--height=16", "--width=16", "--batch-size=4"]
    flags = [*size, f"--records={folder / 'set'}", "--step=0.001", "--steps=3"]
    assert bench.cli(["data", str(folder), *flags]) == 0
    title, _, films, number, _, loader, plain, waits = capsys.readouterr().out.splitlines()
    assert title.startswith("3 films to 9 frames of 16x16")
    assert films.split()[:2] == ["ltx2_jax", "2"]
    assert all(float(x) > 0 for x in films.split()[2:])
    assert number.startswith("10 records")
    assert loader.startswith("the loader")
    assert plain.startswith("reading the files")
    assert "of 3 steps" in waits


def test_what_there_is_nothing_to_measure_of_is_told(folder, tmp_path, capsys):
    for flags, message in (
        ([], "give a folder of films, or --records"),
        ([str(tmp_path)], "no films here"),
        ([str(folder), "--frames=99"], "none of the films can be used; the first: "),
        ([str(folder), "--frames=9", "--peer=/none/python"], "--peer=/none/python: No such file"),
    ):
        assert bench.cli(["data", *flags]) == 2
        assert message in capsys.readouterr().err
