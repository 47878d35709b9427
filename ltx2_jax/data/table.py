"""The table that a dataset is made of: clips and captions, as CSV, JSON or JSONL."""

import csv
import dataclasses
import io
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ltx2_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of a table.

    Attributes:
      name: the clip's path as the table gives it.
      path: where that is: relative paths count from the table's folder.
      caption: its text; may be empty.
    """

    name: str
    path: Path
    caption: str


def read_table(path: str | os.PathLike) -> list[Row]:
    """Reads a table of clips and captions, in the layout of the official trainer.

    CSV with a header, JSON (a list of objects) or JSONL, told apart by the suffix. Columns: `video`
    (or `media_path`) and `caption`; others are ignored (`T/docs/dataset-preparation.md`).

    Raises:
      UserError: naming the file, and the line or column: missing or malformed file, missing column
        or value, no rows.
    """
    path = Path(path)
    readers = {".csv": _read_csv, ".json": _read_json, ".jsonl": _read_jsonl}
    if path.suffix.lower() not in readers:
        raise UserError(f"{path}: a table is a .csv, .json or .jsonl file")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise UserError(f"{path}: no such table") from None
    except OSError as error:
        raise UserError(f"{path}: cannot read the table: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text (byte {error.start})") from None
    rows = []
    for where, values in readers[path.suffix.lower()](path, text):
        video = "video" if "video" in values else "media_path"
        for column in (video, "caption"):
            if column not in values:
                name = "'caption'" if column == "caption" else "'video' (or 'media_path')"
                there = ", ".join(repr(key) for key in values) or "none"
                raise UserError(f"{where}: no column {name}; there: {there}")
            if not isinstance(values[column], str):
                raise UserError(f"{where}: column {column!r} has no text")
            _check_unicode(values[column], f"{where}: column {column!r}")
        name, caption = values[video].strip(), values["caption"].strip()
        if not name:
            raise UserError(f"{where}: column {video!r} is empty")
        rows.append(Row(name, path.parent / name, caption))
    if not rows:
        raise UserError(f"{path}: the table has no rows")
    return rows


def _check_unicode(text: str, where: str) -> None:
    """JSON can spell out half a surrogate pair, which no file is named and nothing can encode."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{where}: half a surrogate pair at position {error.start}") from None


def _read_csv(path: Path, text: str) -> Iterator[tuple[str, dict[str, Any]]]:
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True, skipinitialspace=True)
    try:
        for values in reader:
            # The header is at fault when a column is missing; its line is 1.
            complete = "caption" in values and ("video" in values or "media_path" in values)
            # Key None holds the values beyond the last column.
            if None in values:
                raise UserError(
                    f"{path}:{reader.line_num}: more values than columns; "
                    "put a caption with commas in double quotes"
                )
            yield f"{path}:{reader.line_num if complete else 1}", values
    except csv.Error as error:
        # The inner reader's count: the outer one's stays at the last row that was fine.
        raise UserError(f"{path}:{reader.reader.line_num}: not CSV: {error}") from None


def _read_json(path: Path, text: str) -> Iterator[tuple[str, dict[str, Any]]]:
    try:
        rows = json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"{path}:{error.lineno}: not JSON: {error.msg}") from None
    if not isinstance(rows, list):
        raise UserError(f"{path}: must be a list of objects, not {type(rows).__name__}")
    for index, values in enumerate(rows):
        if not isinstance(values, dict):
            raise UserError(f"{path}: entry {index} must be an object, not {values!r:.40}")
        yield f"{path}: entry {index}", values


def _read_jsonl(path: Path, text: str) -> Iterator[tuple[str, dict[str, Any]]]:
    # Not splitlines: a JSON string may hold U+2028, which that takes for the end of a line.
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            values = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(f"{path}:{number}: not JSON: {error.msg}") from None
        if not isinstance(values, dict):
            raise UserError(f"{path}:{number}: must be an object, not {values!r:.40}")
        yield f"{path}:{number}", values
