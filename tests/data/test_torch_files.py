import pickle
import random
import struct
import tracemalloc
import zipfile
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from ltx2_jax.data.torch_files import read_pt, write_pt
from ltx2_jax.errors import UserError

GOLDEN = Path(__file__).parents[1] / "golden_training" / "precomputed"
LATENTS = GOLDEN / "v2" / ".precomputed" / "latents" / "clips" / "a.pt"


def archive(path, program, storages=(b"\0" * 16,), *, folder="x", method=zipfile.ZIP_STORED):
    """A file as torch.save makes it, around any pickle."""
    with zipfile.ZipFile(path, "w", method) as file:
        file.writestr(f"{folder}/data.pkl", program)
        for index, content in enumerate(storages):
            file.writestr(f"{folder}/data/{index}", content)
    return path


def tensor(count=4, offset=0, shape=(4,), strides=(1,), kind=b"FloatStorage", key=b"0"):
    """The operations that torch's pickler writes for a dict of one tensor, in protocol 2."""

    def number(value):
        return b"J" + struct.pack("<i", value)

    def group(values):
        return b"(" + b"".join(map(number, values)) + b"t"

    return (
        b"\x80\x02}X\1\0\0\0a" b"ctorch._utils\n_rebuild_tensor_v2\n((X\7\0\0\0storagectorch\n"
        + kind + b"\nX" + struct.pack("<I", len(key)) + key + b"X\3\0\0\0cpu" + number(count)
        + b"tQ" + number(offset) + group(shape) + group(strides)
        + b"\x89ccollections\nOrderedDict\n)RtRs."
    )  # fmt: skip


def refusal(path) -> str:
    with pytest.raises(UserError) as caught:
        read_pt(path)
    text = str(caught.value)
    assert text.startswith(f"{path}: ")
    assert len(text.splitlines()) == 1
    return text.removeprefix(f"{path}: ")


class Call:
    """Pickled, it calls a function when it is unpickled."""

    def __init__(self, function, *arguments):
        self.made = function, arguments

    def __reduce__(self):
        return self.made


def test_what_is_written_is_read(tmp_path):
    entries = {
        "bf16": np.arange(6, dtype=ml_dtypes.bfloat16).reshape(2, 3),
        "turned": np.arange(6.0).reshape(2, 3).T,
        "flags": np.array([True, False]),
        "none": np.zeros((0, 3), np.float32),
        "number": np.array(3, np.int64),
        "counts": [0, 255, 256, 65536, -1, 2**31, -(2**40)],
        "real": -0.1,
        "text": "naïve 球",
        "nothing": None,
        "yes": True,
    }
    counts = entries.pop("counts")
    entries |= {f"n{i}": value for i, value in enumerate(counts)}
    entries |= {f"many {i}": i for i in range(300)}  # memo numbers beyond a byte
    write_pt(tmp_path / "deep" / "a.pt", entries)
    got = read_pt(tmp_path / "deep" / "a.pt")
    assert list(got) == list(entries)
    for name, value in entries.items():
        if isinstance(value, np.ndarray):
            assert got[name].dtype == value.dtype
            assert got[name].size == value.size
            if value.size:
                np.testing.assert_array_equal(got[name], value)
        else:
            assert got[name] == value
            assert type(got[name]) is type(value)


def test_storages_begin_where_they_can_be_mapped_and_shared_ones_are_stored_once(tmp_path):
    both = np.ones((64, 64), np.float32)
    write_pt(tmp_path / "a.pt", {"video": both, "audio": both, "other": np.zeros(3, np.uint8)})
    with zipfile.ZipFile(tmp_path / "a.pt") as file:
        data = [info for info in file.infolist() if "/data/" in info.filename]
        raw = (tmp_path / "a.pt").read_bytes()
    assert [info.file_size for info in data] == [4 * 64 * 64, 3]
    for info in data:
        lengths = struct.unpack("<HH", raw[info.header_offset + 26 : info.header_offset + 30])
        assert (info.header_offset + 30 + sum(lengths)) % 64 == 0
    got = read_pt(tmp_path / "a.pt")
    assert np.shares_memory(got["video"], got["audio"])


def test_the_sizes_are_told_without_the_bytes(tmp_path):
    data = bytearray(LATENTS.read_bytes())
    place = data.index(read_pt(LATENTS)["latents"].tobytes())
    data[place] ^= 1
    (tmp_path / "a.pt").write_bytes(data)
    sizes = read_pt(tmp_path / "a.pt", sizes_only=True)
    assert sizes["latents"].shape == (4, 3, 2, 4)
    assert sizes["fps"] == 24
    assert "checksum" in refusal(tmp_path / "a.pt")


def test_a_pickle_that_would_run_something_is_refused_by_its_name(tmp_path):
    mark = tmp_path / "mark"
    for call, name in (
        (Call(open, str(mark), "w"), "open"),
        (Call(exec, f"open({str(mark)!r}, 'w')"), "exec"),
        (Call(eval, f"open({str(mark)!r}, 'w')"), "eval"),
        (Call(Path.touch, mark), "getattr"),
    ):
        path = archive(tmp_path / "a.pt", pickle.dumps({"latents": call}, protocol=2))
        assert name in refusal(path)
    for program, name in (
        (b"\x80\x02cos\nsystem\nX\4\0\0\0true\x85R.", "'os.system'"),
        (b"cos\nsystem\n(X\4\0\0\0truetR.", "'os.system'"),
        (b"(X\4\0\0\0trueios\nsystem\n.", "INST"),
        (b"\x80\x04\x8c\x02os\x8c\x06system\x93.", "SHORT_BINUNICODE"),
        (b"\x80\x02ctorch._utils\n_rebuild_parameter\n.", "'torch._utils._rebuild_parameter'"),
        (b"\x80\x02ctorch\nComplexFloatStorage\n.", "'torch.ComplexFloatStorage'"),
        (b"\x80\x02ccollections\nOrderedDict\n}b.", "BUILD"),
        (b"\x80\x02}ccollections\nOrderedDict\n)\x81.", "NEWOBJ"),
        (b"\x80\x02ccollections\nOrderedDict\n(X\1\0\0\0at\x85R.", "'collections.OrderedDict'"),
        (pickle.dumps({"a": [1]}, protocol=2), "EMPTY_LIST"),
        (pickle.dumps({"a": b"1"}, protocol=2), "'_codecs.encode'"),
        (pickle.dumps({"a": {"b": 1}}, protocol=2), "'a' is a dict"),
        (pickle.dumps({"a": (1, 2)}, protocol=2), "'a' is a tuple"),
        (pickle.dumps({1: 2}, protocol=2), "named by a int"),
        (pickle.dumps("a", protocol=2), "holds a str, not a dict"),
        (pickle.dumps(None, protocol=2), "holds a NoneType"),
    ):
        assert name in refusal(archive(tmp_path / "a.pt", program))
    assert not mark.exists()


def test_a_tensor_stays_within_its_storage(tmp_path):
    floats = np.arange(4, dtype="<f4").tobytes()
    good = read_pt(archive(tmp_path / "good.pt", tensor(4, 1, (3,), (1,)), [floats]))
    np.testing.assert_array_equal(good["a"], [1, 2, 3])
    for program, reason in (
        (tensor(4, 1), "reaches beyond its storage of 4"),
        (tensor(4, 0, (2, 2), (2, 2)), "reaches beyond"),
        (tensor(4, 0, (2,), (2**31 - 1,)), "reaches beyond"),
        (tensor(4, 0, (2**31 - 1, 2**31 - 1), (0, 0)), "reaches beyond"),
        (tensor(4, 9, (0,), (1,)), "reaches beyond"),
        (tensor(4, 0, (-1,), (1,)), "not numbers from 0 on"),
        (tensor(4, -1), "not numbers from 0 on"),
        (tensor(4, 3, (4,), (-1,)), "not numbers from 0 on"),
        (tensor(4, 0, (4,), ()), "no dict of tensors"),
        (tensor(4, 0, (1,) * 17, (1,) * 17), "not numbers from 0 on"),
        (tensor(5), "storage '0' has 16 bytes, not 5 x 4"),
        (tensor(-4), "no name or size"),
        (tensor(4, kind=b"LongStorage"), "has 16 bytes, not 4 x 8"),
        (tensor(16, 0, (16,), kind=b"BoolStorage"), "other bytes than 0 and 1"),
        (tensor(key=b"7"), "no 'x/data/7' in it"),
        (tensor(key=b"../../etc/passwd"), "no 'x/data/../../etc/passwd' in it"),
    ):
        assert reason in refusal(archive(tmp_path / "a.pt", program, [floats])), reason


def test_a_small_file_takes_little_memory_whatever_it_says(tmp_path):
    deflated = archive(
        tmp_path / "bomb.pt",
        tensor(2**25, 0, (2**25,)),
        [b"\0" * 2**27],
        method=zipfile.ZIP_DEFLATED,
    )
    nested = archive(tmp_path / "nested.pt", b"\x80\x02K\1" + b"\x85" * 60000 + b".")
    many = archive(tmp_path / "many.pt", b"\x80\x02" + b"}" * 60000 + b".")
    memo = archive(tmp_path / "memo.pt", b"\x80\x02}r\xff\xff\xff\xff.")
    loop = archive(tmp_path / "loop.pt", b"\x80\x02}q\0X\1\0\0\0ah\0s.")
    large = archive(tmp_path / "large.pt", b"\x80\x02" + b"N0" * 2**20 + b".")
    text = archive(tmp_path / "text.pt", b"\x80\x02X\xff\xff\xff\x7fa.")
    tracemalloc.start()
    assert "compressed" in refusal(deflated)
    assert "holds a tuple" in refusal(nested)
    assert "no dict" in refusal(many)
    assert read_pt(memo) == {}
    assert "'a' is a dict" in refusal(loop)
    assert "larger than 65536 bytes" in refusal(large)
    assert "no dict" in refusal(text)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 20e6


def test_what_is_no_such_file_is_told(tmp_path):
    assert "no such file" in refusal(tmp_path / "none.pt")
    for content, reason in (
        (b"", "not a zip"),
        (b"\x80\x02}.", "not a zip"),
        (b"PK\5\6" + b"\0" * 18, "holds 0 files data.pkl"),
    ):
        (tmp_path / "a.pt").write_bytes(content)
        assert reason in refusal(tmp_path / "a.pt")
    assert "cannot be read" in refusal(tmp_path)
    with zipfile.ZipFile(tmp_path / "two.pt", "w") as file:
        file.writestr("a/data.pkl", b"")
        file.writestr("b/data.pkl", b"")
    assert "holds 2 files data.pkl" in refusal(tmp_path / "two.pt")
    path = archive(tmp_path / "big.pt", tensor())
    with zipfile.ZipFile(path, "a") as file:
        file.writestr("x/byteorder", b"big")
    assert "byte order" in refusal(path)


def test_a_damaged_file_is_one_line_and_never_a_crash(tmp_path):
    """A thousand files with bytes changed, cut off or moved: read, or refused in one line."""
    rng = random.Random(0)
    originals = [p.read_bytes() for p in sorted(GOLDEN.glob("*/.precomputed/*/**/*.pt"))]
    originals = [data for data in originals if len(data) < 8000]
    refusals = []
    for _ in range(1000):
        data = bytearray(rng.choice(originals))
        for _ in range(rng.choice((1, 1, 2, 8))):
            kind, place = rng.randrange(4), rng.randrange(len(data))
            if kind == 0:
                data[place] = rng.randrange(256)
            elif kind == 1:
                del data[place:]
                data += b"\0"
            elif kind == 2:
                del data[place : place + rng.randrange(1, 20)]
                data += b"\0"
            else:
                data[place:place] = bytes(rng.randrange(256) for _ in range(rng.randrange(1, 9)))
        (tmp_path / "a.pt").write_bytes(data)
        try:
            read_pt(tmp_path / "a.pt")
        except UserError as error:
            refusals.append(str(error))
    assert len(refusals) > 500
    assert all(len(text.splitlines()) == 1 and len(text) < 400 for text in refusals)
