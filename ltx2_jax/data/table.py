"""The table that a dataset is made of: clips and captions, as CSV, JSON, JSONL or Parquet.

Or a folder of films, each with its caption in a file beside it.
"""

import codecs
import csv
import dataclasses
import io
import json
import math
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ltx2_jax.errors import UserError
from ltx2_jax.files import read_bytes, reason
from ltx2_jax.media.copies import placed


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of a table.

    Attributes:
      name: the clip's path as the table gives it.
      path: where that is: relative paths count from the table's folder. Of a file in a bucket, as
        `gs://bucket/film.mp4` or by a table there, this is an epath.Path.
      caption: its text, the first of several; may be empty.
      more_captions: the others, with the weight that the choice among all gives each.
      weight: that of the first.
      sound_alone: `path` is a sound file, there is no picture.
      start, end: seconds of the file that are meant; None: from its beginning, to its end.
      others: column to path, for those of `OTHERS` that the row has.
    """

    name: str
    path: Path
    caption: str
    more_captions: tuple[tuple[str, float], ...] = ()
    weight: float = 1.0
    sound_alone: bool = False
    start: float | None = None
    end: float | None = None
    others: Mapping[str, Path] = dataclasses.field(default_factory=dict)

    @property
    def captions(self) -> tuple[tuple[str, float], ...]:
        """All texts, with their weights."""
        return (self.caption, self.weight), *self.more_captions

    def triggered(self, word: str | None) -> "Row":
        """With a word before each of its texts, as the official script puts it there."""
        if word is None:
            return self
        more = tuple((f"{word} {text}", weight) for text, weight in self.more_captions)
        return dataclasses.replace(self, caption=f"{word} {self.caption}", more_captions=more)

    @property
    def has_more(self) -> bool:
        """Whether it says more than a film and a caption."""
        return self != Row(self.name, self.path, self.caption)


# Columns that name files beside the clip: its sound, what it is made from, what is given of it.
OTHERS = ("audio", "reference_video", "reference_audio", "video_mask", "audio_mask")
_OLDER_NAMES = {"media_path": "video", "ref_media_path": "reference_video"}
TABLES = (".csv", ".json", ".jsonl", ".parquet")
FILMS = (".mp4", ".mov", ".mkv", ".webm", ".avi", ".m4v")


def read_table(path: str | os.PathLike) -> list[Row]:
    """Reads a table of clips and captions, in the layout of the official trainer.

    CSV with a header, JSON (a list of objects), JSONL or Parquet, by the suffix. Columns: `video`
    (or `media_path`) and `caption`; a row without `video` and with `audio` is sound alone. Further:
    those of `OTHERS` (or `ref_media_path`), `start` and `end` in seconds, and more captions as
    `caption_NAME`, each with a `weight_NAME` (`weight` is that of `caption`) of 1 unless given.
    Other columns are ignored. What spreadsheets write is understood: blank lines before the header,
    a first line `sep=;`, semicolons or tabs in place of commas, capitals in the header, UTF-16.
    Of a folder, the films in it by name: the caption of a.mp4 is what a.txt says.
    Source of the columns: `packages/ltx-trainer/scripts/process_dataset.py`.

    Raises:
      UserError: naming the file, and the line or column: missing or malformed file, missing column
        or value, no rows.
    """
    path = placed(path)
    readers = dict(zip(TABLES, (_read_csv, _read_json, _read_jsonl, _read_parquet), strict=True))
    suffix = path.suffix.lower()
    if suffix not in readers and path.is_dir():
        return _read_folder(path)
    if suffix not in readers:
        raise UserError(f"{path}: a table is a .csv, .json, .jsonl or .parquet file")
    try:
        content = read_bytes(path)
    except FileNotFoundError:
        raise UserError(f"{path}: no such table") from None
    except OSError as error:
        raise UserError(f"{path}: cannot read the table: {reason(error)}") from None
    rows = [
        _row(path.parent, where, {_OLDER_NAMES.get(k, k): v for k, v in values.items()}, values)
        for where, values in readers[suffix](path, content)
    ]
    if not rows:
        raise UserError(f"{path}: the table has no rows")
    return rows


def films_in(folder: Path) -> list[Path]:
    """The films of a folder, by name; not those of folders in it, nor hidden ones."""
    paths = (path for path in folder.iterdir() if not path.name.startswith("."))
    return sorted(path for path in paths if path.suffix.lower() in FILMS and path.is_file())


def _read_folder(folder: Path) -> list[Row]:
    rows = []
    for film in films_in(folder):
        beside = film.with_suffix(".txt")
        try:
            content = beside.read_bytes()
        except FileNotFoundError:
            raise UserError(f"{film}: no caption: {beside.name} is not beside it") from None
        except OSError as error:
            raise UserError(f"{beside}: cannot be read ({reason(error)})") from None
        values = {"video": film.name, "caption": _as_text(beside, content)}
        rows.append(_row(folder, str(beside), values, values))
    if not rows:
        raise UserError(f"{folder}: no films here ({', '.join(FILMS)})")
    return rows


def _row(folder: Path, where: str, values: dict[str, Any], there: dict[str, Any]) -> Row:
    """The row of a line, found `where` with the columns `there`."""
    main = "video" if "video" in values else "audio"
    if main == "video" and "audio" in values and not _text(values, "video", where):
        main = "audio"
    for column in (main, "caption"):
        if column not in values:
            name = "'caption'" if column == "caption" else "'video' (or 'media_path')"
            found = ", ".join(repr(key) for key in there) or "none"
            raise UserError(f"{where}: no column {name}; there: {found}")
    name, caption = (_text(values, column, where, needed=True) for column in (main, "caption"))
    if not name:
        shown = "media_path" if main == "video" and "video" not in there else main
        raise UserError(f"{where}: column {shown!r} is empty")
    others = {
        column: _file(folder, text)
        for column in OTHERS
        if column in values and column != main and (text := _text(values, column, where))
    }
    more = {
        column.removeprefix("caption_"): text
        for column in values
        if str(column).startswith("caption_") and (text := _text(values, column, where))
    }
    start, end = (_number(values, column, where) for column in ("start", "end"))
    if end is not None and end <= (start or 0):
        raise UserError(f"{where}: end={end:g} is not after start={start or 0:g}")
    weights = {
        tail: _number(values, f"weight{tail}", where) for tail in ("", *map("_{}".format, more))
    }
    if not any(weight is None or weight > 0 for weight in weights.values()):
        raise UserError(f"{where}: the weights of its captions are all 0")
    return Row(
        name,
        _file(folder, name),
        caption,
        tuple((text, _weight(weights[f"_{name}"])) for name, text in more.items()),
        _weight(weights[""]),
        main == "audio",
        start,
        end,
        others,
    )


def _file(folder: Path, name: str) -> Path:
    return placed(name) if name.startswith("gs://") else folder / name


def _weight(number: float | None) -> float:
    return 1.0 if number is None else number


def _text(values: dict[str, Any], column: str, where: str, needed: bool = False) -> str:
    """The text in a column; that of a column which need not be there may be missing."""
    value = values.get(column)
    if value is None and not needed:
        return ""
    if not isinstance(value, str):
        raise UserError(f"{where}: column {column!r} has no text")
    _check_text(value, f"{where}: column {column!r}")
    return value.strip()


def _number(values: dict[str, Any], column: str, where: str) -> float | None:
    """The number from 0 on in a column; None if there is none."""
    value = values.get(column)
    if value is None or (isinstance(value, str) and not value.strip()):
        return None
    try:
        number = float(value) if isinstance(value, str | int | float) else math.nan
    except (ValueError, OverflowError):
        number = math.nan
    if not 0 <= number < math.inf or isinstance(value, bool):
        raise UserError(f"{where}: column {column!r} is {value!r:.40}, not a number from 0 on")
    return number


def _check_text(text: str, where: str) -> None:
    """Refuses what no file is named and no tokenizer takes, and JSON can spell out."""
    if "\0" in text:
        raise UserError(f"{where}: a NUL character at position {text.index(chr(0))}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{where}: half a surrogate pair at position {error.start}") from None


def _as_text(path: Path, content: bytes) -> str:
    try:
        wide = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
        return content.decode("utf-16" if wide else "utf-8-sig")
    except UnicodeDecodeError as error:
        kind = error.encoding.upper()
        raise UserError(f"{path}: not {kind} text (byte {error.start}): save it as UTF-8") from None


def _read_csv(path: Path, content: bytes) -> Iterator[tuple[str, dict[str, Any]]]:
    skipped, delimiter, text = _dialect(_as_text(path, content))
    csv.field_size_limit(max(csv.field_size_limit(), len(text) + 1))  # else 131,072 characters
    reader = csv.DictReader(
        io.StringIO(text, newline=""), strict=True, skipinitialspace=True, delimiter=delimiter
    )
    try:
        reader.fieldnames = [name.strip().lower() for name in reader.fieldnames or ()]
        for values in reader:
            # The header is at fault when a column is missing; its line is 1.
            main = {"video", "media_path", "audio"} & values.keys()
            complete = "caption" in values and bool(main)
            # Key None holds the values beyond the last column.
            if None in values:
                raise UserError(
                    f"{path}:{skipped + reader.line_num}: more values than columns; "
                    f"put a caption with {delimiter!r} in double quotes"
                )
            yield f"{path}:{skipped + (reader.line_num if complete else 1)}", values
    except csv.Error as error:
        # The inner reader's count: the outer one's stays at the last row that was fine.
        line = skipped + reader.reader.line_num
        raise UserError(f"{path}:{line}: not CSV: {error}") from None


def _dialect(text: str) -> tuple[int, str, str]:
    """Lines before the header, what separates values, and the text from the header on."""
    lines = text.splitlines(keepends=True)
    skipped, delimiter = 0, None
    while skipped < len(lines) and not lines[skipped].strip(" ,;\t\r\n"):
        skipped += 1
    if skipped < len(lines) and (line := lines[skipped].rstrip("\r\n")).lower().startswith("sep="):
        delimiter = line[4:] or ","
        skipped += 1
    header = lines[skipped].lower() if skipped < len(lines) else ""
    if delimiter is None or len(delimiter) != 1:
        # A header without a comma that has the columns all the same.
        other = [d for d in ";\t" if d in header and "," not in header and "caption" in header]
        delimiter = other[0] if other else ","
    return skipped, delimiter, "".join(lines[skipped:])


def _read_json(path: Path, content: bytes) -> Iterator[tuple[str, dict[str, Any]]]:
    try:
        rows = json.loads(_as_text(path, content))
    except json.JSONDecodeError as error:
        raise UserError(f"{path}:{error.lineno}: not JSON: {error.msg}") from None
    except RecursionError:
        raise UserError(f"{path}: not a table: brackets in brackets without end") from None
    if not isinstance(rows, list):
        raise UserError(f"{path}: must be a list of objects, not {type(rows).__name__}")
    for index, values in enumerate(rows):
        if not isinstance(values, dict):
            raise UserError(f"{path}: entry {index} must be an object, not {values!r:.40}")
        yield f"{path}: entry {index}", values


def _read_jsonl(path: Path, content: bytes) -> Iterator[tuple[str, dict[str, Any]]]:
    # Not splitlines: a JSON string may hold U+2028, which that takes for the end of a line.
    for number, line in enumerate(_as_text(path, content).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            values = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(f"{path}:{number}: not JSON: {error.msg}") from None
        except RecursionError:
            raise UserError(f"{path}:{number}: brackets in brackets without end") from None
        if not isinstance(values, dict):
            raise UserError(f"{path}:{number}: must be an object, not {values!r:.40}")
        yield f"{path}:{number}", values


_KNOWN = re.compile(r"video|media_path|ref_media_path|start|end|(caption|weight)(_.*)?", re.DOTALL)


def _read_parquet(path: Path, content: bytes) -> Iterator[tuple[str, dict[str, Any]]]:
    try:
        import pyarrow.parquet
    except ImportError:
        raise UserError(f"{path}: Parquet needs pyarrow: pip install 'ltx2-jax[parquet]'") from None
    try:
        file = pyarrow.parquet.ParquetFile(
            pyarrow.BufferReader(content), page_checksum_verification=True
        )
        names = file.schema_arrow.names
        # Others may hold whole films.
        known = [name for name in names if name in OTHERS or _KNOWN.fullmatch(name)]
        index = 0
        for batch in file.iter_batches(1024, columns=known):
            for values in batch.to_pylist():
                yield f"{path}: row {index}", dict.fromkeys(names) | values
                index += 1
    # What the library raises for damaged files is not told in one place.
    except Exception as error:
        raise UserError(f"{path}: not a readable Parquet file ({reason(error):.200})") from None
