"""Clips that are asked for in a file, each with what it is given beside its prompt.

A line is a prompt, or a JSON object with the arguments of `Pipeline.make` by their names:

    a dog barks twice
    {"prompt": "a dog barks twice", "image": "dog.png", "seed": 3}
    {"prompt": "a door falls shut", "image": [["open.png", 0, 1.0], ["shut.png", 48, 0.8]]}
    {"prompt": "rain on a tin roof", "video": "roof.mp4", "changes": {"stage1.steps": 20}}

Where Python takes a tuple, (image, frame, strength), a line has a list. Files are looked for in the
folder of the file that names them.
"""

import contextlib
import difflib
import json
import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ltx2_jax.errors import UserError
from ltx2_jax.sampling.making import Maker
from ltx2_jax.sampling.output import Made
from ltx2_jax.sampling.recipes import RECIPES
from ltx2_jax.text.captions import read_prompts

# A line that says how long its clip is replaces what is said for all.
LENGTHS = ("num_frames", "duration", "auto_duration")


@dataclass(frozen=True)
class Wish:
    """One clip that is asked for."""

    prompt: str
    given: dict[str, Any] = field(default_factory=dict)  # arguments of `Pipeline.make`
    where: str = ""  # file and line, for what is said of it
    files: tuple[Path, ...] = ()  # that are given


def read_wishes(path: str | os.PathLike, where: str) -> list[Wish]:
    """One a line.

    Raises:
      UserError: with `where`, the flag or field that names the file: it cannot be read; with the
        line: it is blank, is no JSON though it begins with "{", names an argument that there is
        not, has a value of another kind, or a file that is not there.
    """
    lines, folder = read_prompts(path, where), Path(path).absolute().parent
    wishes = []
    for number, line in enumerate(lines, 1):
        place = f"{where}: {path}, line {number}"
        with named(place):
            if not line.lstrip().startswith("{"):
                wishes.append(Wish(line, where=place))
                continue
            try:
                values = json.loads(line)
            except ValueError as error:
                raise UserError(f"is not JSON ({error})") from None
            wishes.append(wish_of(values, folder, place))
    return wishes


def wish_of(values: dict[str, Any], folder: Path, where: str = "") -> Wish:
    """The wish of a line's object; null is as if a name were absent. For errors see above."""
    files: list[Path] = []
    values = {name: value for name, value in values.items() if value is not None}
    prompt = values.pop("prompt", None)
    if not isinstance(prompt, str) or not prompt.strip():
        raise UserError('"prompt" is missing, what to see and hear')

    def place(text: Any) -> str:
        if not isinstance(text, str) or not text:
            raise ValueError
        found = folder / text
        if not found.exists():
            raise UserError(f"no such file: {found}")
        files.append(found)
        return str(found)

    given = {}
    for name, value in values.items():
        if name not in KINDS:
            close = difflib.get_close_matches(name, KINDS, 1)
            hint = f"did you mean {close[0]}?" if close else f"use {', '.join(KINDS)}"
            raise UserError(f'no argument is called "{name}"; {hint}')
        what, read = KINDS[name]
        try:
            given[name] = read(value, place)
        except UserError as error:
            raise UserError(f"{name}: {error}") from None
        except (ValueError, TypeError, AttributeError, LookupError):
            raise UserError(f"{name}={json.dumps(value)[:60]} is not {what}") from None
    return Wish(prompt, given, where, tuple(files))


@contextlib.contextmanager
def named(where: str) -> Iterator[None]:
    """What a user did wrong within, with `where` before it."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{where}: {error}" if where else str(error)) from None


# ---------------------------------------------------------------------------------- kinds of values

Place = Callable[[Any], str]  # the file that a value names


def _whole(value: Any, _: Place) -> int:
    if type(value) is not int or value < 0:
        raise ValueError
    return value


def _seed(value: Any, place: Place) -> int:
    if _whole(value, place) >= 2**32:
        raise ValueError
    return value


def _number(value: Any, _: Place) -> float:
    if type(value) not in (int, float) or not math.isfinite(value):
        raise ValueError
    return value


def _switch(value: Any, _: Place) -> bool:
    if type(value) is not bool:
        raise ValueError
    return value


def _text(value: Any, _: Place) -> str:
    if not isinstance(value, str):
        raise ValueError
    return value


def _file(value: Any, place: Place) -> str:
    return place(value)


def _one(value: Any, place: Place) -> Any:
    """A file, or one with numbers: (file, frame, strength)."""
    if isinstance(value, str):
        return place(value)
    name, *numbers = value
    return place(name), *(_number(number, place) for number in numbers)


def _some(value: Any, place: Place) -> list[Any]:
    """One, or a list of such."""
    if not isinstance(value, str | list):
        raise ValueError
    single = isinstance(value, str) or (len(value) > 1 and type(value[1]) in (int, float))
    return [_one(each, place) for each in ([value] if single else list(value))]


def _pictures(value: Any, place: Place) -> list[Any]:
    found = _some(value, place)
    for picture in found:
        if isinstance(picture, tuple):
            _, *numbers = picture
            if len(numbers) > 3 or any(type(n) is not int for n in (*numbers[:1], *numbers[2:])):
                raise ValueError
    return found


def _references(value: Any, place: Place) -> list[Any]:
    found = _some(value, place)
    if any(isinstance(each, tuple) and len(each) > 3 for each in found):
        raise ValueError
    return found


def _dub(value: Any, place: Place) -> Any:
    (found,) = _references(value, place)
    return found


def _recipe(value: Any, _: Place) -> str:
    if value not in RECIPES:
        raise ValueError
    return value


def _duration(value: Any, place: Place) -> float | str:
    return value if value == "auto" else _number(value, place)


def _limits(value: Any, place: Place) -> tuple[float, float]:
    low, high = value
    return _number(low, place), _number(high, place)


def _changes(value: Any, _: Place) -> dict[str, str]:
    def text(of: Any) -> str:
        return ",".join(map(str, of)) if isinstance(of, list) else str(of)

    return {name: text(of) for name, of in value.items()}


def _enhancer(value: Any, place: Place) -> str:
    """A folder, or a name on the Hugging Face Hub."""
    with contextlib.suppress(UserError):
        return place(value)
    return value


_WHOLE, _NUMBER = ("a whole number", _whole), ("a number", _number)
_SWITCH, _TEXT, _FILE = ("true or false", _switch), ("text", _text), ("a file", _file)
_IMAGES = ("a file, [FILE, FRAME, STRENGTH, CRF], or a list of such", _pictures)
_CLIP = "a file, or [FILE, STRENGTH, ATTENTION]"
# What a value is called, and what reads it.
KINDS: dict[str, tuple[str, Callable[[Any, Place], Any]]] = {
    "recipe": (" or ".join(RECIPES), _recipe),
    "changes": ('an object such as {"stage1.steps": 20}', _changes),
    "seed": (f"a whole number from 0 to {2**32 - 1}", _seed),
    "negative_prompt": _TEXT,
    "num_frames": _WHOLE,
    "duration": ('seconds, or "auto"', _duration),
    "auto_duration": ("[MIN, MAX] seconds", _limits),
    "height": _WHOLE,
    "width": _WHOLE,
    "fps": _NUMBER,
    "picture": _SWITCH,
    "sound": _SWITCH,
    "image": _IMAGES,
    "keyframes": _IMAGES,
    "num_generated_keyframes": _WHOLE,
    "audio": _FILE,
    "audio_start": _NUMBER,
    "audio_max_duration": _NUMBER,
    "video": _FILE,
    "start": _NUMBER,
    "end": _NUMBER,
    "retake": _TEXT,
    "extend": _NUMBER,
    "extend_before": _NUMBER,
    "references": (f"{_CLIP}, or a list of such", _references),
    "dub": (_CLIP, _dub),
    "voice": _FILE,
    "skip_stage_2": _SWITCH,
    "enhance_prompt": _SWITCH,
    "enhancer": ("a folder", _enhancer),
}


# ------------------------------------------------------------------------------------------ clips


def check(maker: Maker, wishes: Sequence[Wish], **shared: Any) -> None:
    """UserError, with its line, for a wish that `make` could not fulfil; no weights are needed."""
    for wish in wishes:
        with named(wish.where):
            maker.check([wish.prompt], **_together(shared, wish))


def make(maker: Maker, wishes: Sequence[Wish], **shared: Any) -> list[Made]:
    """A clip for each wish, in their order; those that differ in prompt and seed alone together.

    `shared` is given to all that have nothing else of the same name. Without a seed of its own clip
    i has the i-th after the one that is shared. For errors see `check`: all come before the work.
    """
    groups = _groups(wishes)
    if len(groups) > 1:
        check(maker, wishes, **shared)
    base = shared.pop("seed", None)
    base = maker.seed if base is None else base
    made: dict[int, Made] = {}
    for numbers in groups:
        first = wishes[numbers[0]]
        seeds = [wishes[i].given.get("seed", (base + i) % 2**32) for i in numbers]
        given = {**_together(shared, first), "seed": seeds}
        with named(first.where):
            found = maker.make([wishes[i].prompt for i in numbers], **given)
        made |= dict(zip(numbers, found, strict=True))
    return [made[number] for number in range(len(wishes))]


def _together(shared: dict[str, Any], wish: Wish) -> dict[str, Any]:
    """What a clip is given: what all are, and what its own line says."""
    own = wish.given
    if any(name in own for name in LENGTHS):
        shared = {name: value for name, value in shared.items() if name not in LENGTHS}
    changes = {**(shared.get("changes") or {}), **own.get("changes", {})}
    return {**shared, **own, "changes": changes}


def _groups(wishes: Sequence[Wish]) -> list[list[int]]:
    """Numbers of wishes that one call can make; a length is chosen for one clip at a time."""
    groups: list[tuple[dict[str, Any], list[int]]] = []
    for number, wish in enumerate(wishes):
        given = {name: value for name, value in wish.given.items() if name != "seed"}
        alone = given.get("duration") == "auto" or "auto_duration" in given
        for other, numbers in groups:
            if other == given and not alone:
                numbers.append(number)
                break
        else:
            groups.append((given, [number]))
    return [numbers for _, numbers in groups]
