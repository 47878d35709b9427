"""Safetensors files: read as the reference package reads them, refused when their header lies."""

import json
import os
import re

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from ltx2_jax.errors import UserError
from ltx2_jax.weights import writing as writing_module
from ltx2_jax.weights.loading import Source
from ltx2_jax.weights.tensor_files import DTYPES, TensorFile, layout, write_rows
from ltx2_jax.weights.writing import writing

RNG = np.random.default_rng(0)
TENSORS = {
    "b.weight": RNG.normal(size=(6, 4)).astype(ml_dtypes.bfloat16),
    "a.scale": RNG.normal(size=(3,)).astype(np.float32),
    "half": RNG.normal(size=(2, 1, 3)).astype(np.float16),
    "eight": RNG.normal(size=(5, 2)).astype(ml_dtypes.float8_e4m3fn),
    "bytes": RNG.integers(0, 256, 7, np.uint8),
    "number": np.asarray(4, np.float32),
    "nothing": np.zeros((0, 3), np.float32),
}


def raw(path, header, data=b""):
    """A file with this header, a dict or text, and these bytes."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def entry(dtype="F32", shape=(2,), offsets=(0, 8)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


def same(a, b):
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


def test_files_of_the_reference_package_are_read_bit_for_bit(tmp_path):
    path = tmp_path / "x.safetensors"
    save_file(TENSORS, path, {"model_version": "2.3"})
    with TensorFile(path) as file:
        assert file.metadata == {"model_version": "2.3"}
        assert set(file.tensors) == set(TENSORS)
        for name, value in TENSORS.items():
            assert same(file.read(name), np.asarray(value)), name
        assert file.bytes_read == sum(value.nbytes for value in TENSORS.values())


def test_rows_are_read_alone_and_into_a_given_buffer(tmp_path):
    path = tmp_path / "x.safetensors"
    save_file(TENSORS, path)
    with TensorFile(path) as file:
        assert same(file.read("b.weight", slice(2, 5)), TENSORS["b.weight"][2:5])
        assert file.bytes_read == 3 * 4 * 2
        out = np.zeros((6, 4), ml_dtypes.bfloat16)
        file.read("b.weight", slice(1, 3), out[4:])
        assert same(out[4:], TENSORS["b.weight"][1:3])
        assert not out[:4].any()


def test_what_is_written_is_what_the_reference_package_writes(tmp_path):
    ours, theirs = tmp_path / "ours.safetensors", tmp_path / "theirs.safetensors"
    save_file(TENSORS, theirs, {"model_version": "2.3"})
    places = layout({n: (v.dtype, v.shape) for n, v in TENSORS.items()}, {"model_version": "2.3"})
    with open(ours, "wb") as file:
        file.write(places.header)
        file.flush()
        for name in reversed(places.tensors):
            write_rows(file.fileno(), places.tensors[name], TENSORS[name])
    assert ours.read_bytes() == theirs.read_bytes()
    assert places.nbytes == theirs.stat().st_size


def test_what_the_system_moves_in_parts_arrives_whole(tmp_path, monkeypatch):
    """Linux moves two gigabytes a call at most, and may move less."""
    read, write, path = os.preadv, os.pwrite, tmp_path / "x.safetensors"
    save_file(TENSORS, tmp_path / "theirs.safetensors")
    monkeypatch.setattr(os, "preadv", lambda fd, views, at: read(fd, [views[0][:5]], at))
    monkeypatch.setattr(os, "pwrite", lambda fd, data, at: write(fd, data[:5], at))
    places = layout({n: (v.dtype, v.shape) for n, v in TENSORS.items()})
    with open(path, "wb") as file:
        file.write(places.header)
        file.flush()
        for name, stored in places.tensors.items():
            write_rows(file.fileno(), stored, TENSORS[name])
    assert path.read_bytes() == (tmp_path / "theirs.safetensors").read_bytes()
    with TensorFile(path) as file:
        assert all(same(file.read(name), np.asarray(value)) for name, value in TENSORS.items())


def test_every_tensor_starts_at_a_multiple_of_its_numbers():
    kinds = {f"t{i}": (dtype, (3,)) for i, dtype in enumerate(DTYPES.values())}
    places = layout(kinds)
    assert all(s.start % s.dtype.itemsize == 0 for s in places.tensors.values())


@pytest.mark.parametrize(
    ("header", "data", "message"),
    [
        (b"hello", b"", "its header is not JSON"),
        (b"[1, 2]", b"", "its header is not a JSON object"),
        (b'{"a": {"x": \xff}}', b"", "its header is not JSON"),
        ({"__metadata__": {"a": 1}}, b"", "its metadata is not text"),
        ({"a": {"dtype": "F32"}}, b"", "the header's entry of a is malformed"),
        ({"a": entry(shape=(-2,))}, bytes(8), "the header's entry of a is malformed"),
        ({"a": entry(offsets=(0, 8.0))}, bytes(8), "the header's entry of a is malformed"),
        ({"a": entry("F4")}, bytes(8), "a has the dtype F4, which is not one of BOOL, U8"),
        ({"a": entry(shape=(3,))}, bytes(8), r"a takes 8 bytes, but F32 [3] has 12"),
        ({"a": entry()}, bytes(7), "truncated: its tensors end at byte"),
        ({"a": entry()}, bytes(9), "its tensors end at byte"),
        ({"a": entry(), "b": entry(offsets=(4, 12))}, bytes(12), "b overlaps a"),
        ({"a": entry(), "b": entry(offsets=(0, 8))}, bytes(8), "overlaps"),
        ({"a": entry(), "b": entry(offsets=(12, 20))}, bytes(20), "4 bytes before b belong to no"),
        (b'{"a": 1, "a": 2}', b"", "a is there twice"),
        (b'{"a":' * 100_000, b"", "its header is not JSON"),
    ],
)
def test_a_header_that_lies_is_refused_in_one_line(tmp_path, header, data, message):
    path = raw(tmp_path / "x.safetensors", header, data)
    with pytest.raises(UserError, match=re.escape(message)) as error:
        TensorFile(path)
    assert str(error.value).startswith(f"{path}: not a readable safetensors file (")
    assert "\n" not in str(error.value)


def test_files_that_are_no_safetensors_files_are_named(tmp_path):
    path = tmp_path / "x.safetensors"
    with pytest.raises(UserError, match=r"x\.safetensors: no such file"):
        TensorFile(path)
    path.write_bytes(b"1234567")
    with pytest.raises(UserError, match="7 bytes are too few for a header"):
        TensorFile(path)
    path.write_bytes((2**40).to_bytes(8, "little") + b"{}")
    with pytest.raises(UserError, match=f"its header would have {2**40} bytes, the file has 10"):
        TensorFile(path)
    path.write_bytes(b"\x80\x04\x95pickle" * 10)  # nothing is ever unpickled
    with pytest.raises(UserError, match="not a readable safetensors file"):
        TensorFile(path)


def test_a_file_that_is_cut_off_while_it_is_open_is_named(tmp_path):
    path = tmp_path / "x.safetensors"
    save_file({"a": np.zeros(1000, np.float32)}, path)
    with TensorFile(path) as file:
        os.truncate(path, path.stat().st_size - 4)
        with pytest.raises(UserError, match=r"x\.safetensors: ends inside of a"):
            file.read("a")


# ---- writing -------------------------------------------------------------------------------------

ONE = {"a": (np.dtype("float32"), (4,))}


def left(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_file_that_exists_is_not_replaced(tmp_path):
    path = tmp_path / "x.safetensors"
    path.write_text("mine")
    with pytest.raises(UserError, match="exists already"), writing(path, ONE, {}):
        pass
    assert path.read_text() == "mine"


def test_a_file_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    done, rename, sync = [], os.rename, os.fsync
    monkeypatch.setattr(os, "rename", lambda *names: (done.append("named"), rename(*names)))
    monkeypatch.setattr(os, "fsync", lambda fd: (done.append("on the disk"), sync(fd)))
    with writing(tmp_path / "x.safetensors", ONE, {}) as writer:
        writer.put_array("a", np.arange(4, dtype=np.float32))
    assert done == ["on the disk", "named"]
    assert load_file(tmp_path / "x.safetensors")["a"].tolist() == [0, 1, 2, 3]


def test_a_file_that_lacks_a_tensor_does_not_appear(tmp_path):
    two = ONE | {"b": (np.dtype("float32"), (2,))}
    with (
        pytest.raises(RuntimeError, match=r"not written: \['b'\]"),
        writing(tmp_path / "x.safetensors", two, {}) as writer,
    ):
        writer.put_array("a", np.zeros(4, np.float32))
    assert left(tmp_path) == []


def test_a_tensor_that_is_copied_in_parts_is_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(writing_module, "COPY_ROWS_BYTES", 20)  # two rows of the largest
    source, copy = tmp_path / "x.safetensors", tmp_path / "y.safetensors"
    save_file(TENSORS, source)
    kinds = {n: (v.dtype, v.shape) for n, v in TENSORS.items()}
    with TensorFile(source) as file, writing(copy, kinds, {}) as writer:
        for name in kinds:
            writer.copy(name, Source(file, name))
    assert copy.read_bytes() == source.read_bytes()


def test_an_interrupted_file_leaves_nothing(tmp_path):
    with pytest.raises(KeyboardInterrupt), writing(tmp_path / "x.safetensors", ONE, {}):
        raise KeyboardInterrupt
    assert left(tmp_path) == []


@pytest.mark.parametrize("call", ["posix_fallocate", "pwrite"])
def test_a_disk_that_becomes_full_leaves_nothing(tmp_path, monkeypatch, call):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, call, full)
    path = tmp_path / "x.safetensors"
    with (
        pytest.raises(UserError, match=r"x\.safetensors: cannot be written \(No space left"),
        writing(path, ONE, {}),
    ):
        pass
    assert left(tmp_path) == []


def test_a_file_larger_than_the_disk_is_refused_before_it_is_begun(tmp_path):
    huge = {"a": (np.dtype("float32"), (2**50,))}
    with (
        pytest.raises(UserError, match=r"needs 45035\d\d\.\d GB, .* GB free"),
        writing(tmp_path / "x.safetensors", huge, {}),
    ):
        pass
    assert left(tmp_path) == []


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    path = tmp_path / "file" / "x.safetensors"
    with (
        pytest.raises(UserError, match=r"cannot be written \((File exists|Not a directory)"),
        writing(path, ONE, {}),
    ):
        pass
