"""TPU slices that are not there: their devices, to compile for on any machine.

The TPU compiler is part of libtpu and runs without a TPU: install the `tpu` extra.
"""

import collections
import os
import re
from collections.abc import Sequence
from typing import Any

import jax

from ltx2_jax.errors import UserError

EXAMPLES = "v4:2x2x1, v5e:2x4, v5p:2x2x1, v5p:4x4x4, v6e:2x4, v6e:16x16, tpu7x:2x2x1"
COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
# High-bandwidth memory of one jax device in GiB, by a part of its lower-cased `device_kind`; first
# match wins. A jax device is a chip; on v7x, and in the compiler's slices of v4, one of two cores.
_HBM_GIB = (("v5 lite", 16), ("v5", 95), ("v6", 32), ("7x", 96), ("v4", 16))


def tpu_devices(topology: str) -> Sequence[jax.Device]:
    """The devices of a slice such as "v5p:2x2x1"; programs can be compiled for them, not run.

    Raises:
      UserError: no such slice, or the TPU compiler is not installed.
    """
    # Without these libtpu asks the network for the slice that it runs on, and refuses a second
    # process.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    from jax.experimental import topologies

    try:
        return topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    except Exception as error:  # whatever libtpu raises, and a missing one an ordinary RuntimeError
        text = " ".join(str(error).split())
        if "not installed" in text:
            raise UserError(
                "the TPU compiler is not installed: pip install 'ltx2-jax[tpu]'"
            ) from None
        raise UserError(
            f"--topology={topology}: not a slice that the compiler knows ({text:.100}); "
            f"slices look like {EXAMPLES}"
        ) from None


def hbm_bytes(device_kind: str) -> int | None:
    """High-bandwidth memory of one jax device, or None for a kind that is not listed."""
    kind = device_kind.lower()
    return next((gib * 2**30 for part, gib in _HBM_GIB if part in kind), None)


def memory_facts(compiled: jax.stages.Compiled, device_kind: str) -> dict[str, Any]:
    """Bytes per device of a compiled program, and whether they fit."""
    memory = compiled.memory_analysis()
    peak = memory.argument_size_in_bytes + memory.output_size_in_bytes + memory.temp_size_in_bytes
    hbm = hbm_bytes(device_kind)
    return {
        "weight_bytes_per_chip": memory.argument_size_in_bytes,
        "output_bytes_per_chip": memory.output_size_in_bytes,
        "temporary_bytes_per_chip": memory.temp_size_in_bytes,
        "peak_bytes_per_chip": peak,
        "hbm_bytes_per_chip": hbm,
        "fits": hbm is None or peak <= hbm,
    }


def collectives(program: str) -> dict[str, int]:
    """Number of collective operations of each kind in a compiled program's text.

    Those in the body of a loop count once.
    """
    found = re.findall(rf"({'|'.join(COLLECTIVES)})(?:-start)?\(", program)
    return dict(collections.Counter(found))


def describe_memory(facts: dict[str, Any], output: str) -> str:
    """Two lines about `memory_facts`, for a person; `output` is what the program makes."""
    gib = {name: (facts[name] or 0) / 2**30 for name in facts if name.endswith("_bytes_per_chip")}
    hbm, peak = gib["hbm_bytes_per_chip"], gib["peak_bytes_per_chip"]
    verdict = "fits" if facts["fits"] else f"does not fit: {peak - hbm:.2f} GiB too much"
    return (
        f"  per chip       weights {gib['weight_bytes_per_chip']:.2f}, {output} "
        f"{gib['output_bytes_per_chip']:.2f}, temporaries "
        f"{gib['temporary_bytes_per_chip']:.2f} GiB\n"
        f"  peak per chip  {peak:.2f} of {hbm:.0f} GiB: {verdict}\n"
    )


def describe_counts(counts: dict[str, int]) -> str:
    """{"rows": 2, "columns": 4} -> "2 rows, 4 columns"."""
    return ", ".join(f"{n} {name}" for name, n in counts.items()) or "none"
