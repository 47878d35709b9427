"""The mesh that clips are sampled on where none is asked for.

Memory decides first: weights that one device cannot hold are split over `model`, into as few parts
as fit, since what `model` splits is added up four times in every block. Then guidance passes and
clips go over `data`, as far as they fill it, for they exchange nothing. What is left goes to
`sequence`. No device repeats what another one does. `plan --search` ranks the meshes of a slice by
time, and finds the same ones.
"""

import math
from collections.abc import Sequence

SHARE = 0.75  # of a chip's memory that weights may take; activations need the rest
Sizes = tuple[int, int, int]  # data, model, sequence


def choose(
    devices: int,
    *,
    heads: int,
    weights: float,
    room: float | None,
    rows: Sequence[int] = (),
    tokens: Sequence[int] = (),
) -> Sizes:
    """Sizes of the mesh of so many devices of one slice.

    If the weights fit on no mesh, it is the one that splits them most.

    Args:
      devices: how many there are.
      heads: of the video's attention, which `model` splits.
      weights: bytes of all of them.
      room: bytes of a device; None if nobody knows, and then they are taken to fit.
      rows: of every stage, its clips times its guidance passes; without any, as many as there are
        devices.
      tokens: numbers of video tokens that `sequence` has to divide.
    """

    def worse(sizes: Sizes) -> tuple[float, float, int, int, int]:
        data, model, sequence = sizes
        excess = 0.0 if room is None else max(0.0, weights / model - SHARE * room)
        computed = sum(-(-n // data) * data / n for n in rows)  # of each stage 1, without repeats
        around = sequence // math.gcd(heads // model, sequence)  # groups that keys go round
        return excess, computed, model, around, -data

    return min(legal(devices, heads, tokens), key=worse)


def legal(devices: int, heads: int, tokens: Sequence[int]) -> list[Sizes]:
    """All meshes of so many devices that divide the heads and the video tokens."""
    found = []
    for model in range(1, devices + 1):
        if devices % model or heads % model:
            continue
        for sequence in range(1, devices // model + 1):
            if devices // model % sequence == math.gcd(*tokens) % sequence == 0:
                found.append((devices // (model * sequence), model, sequence))
    return found
