"""The memory that a compiled program needs on one device, and what is told when it is too much."""

import contextlib
import re
from collections.abc import Iterator
from typing import Any

import jax

from ltx2_jax import chips

_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
_SIZE = r"([\d.]+)([KMGT]?)(?:i?B)?"
# Every form in which XLA's TPU compiler says that a program is too large: (needed, available).
_OVERFLOWS = (
    ("hbm", rf"HLO temporaries \({_SIZE}\) exceeds available HBM \({_SIZE}\)"),
    (None, rf"in memory space (\w+)\..{{0,40}}?Used {_SIZE} of {_SIZE}"),
    ("vmem", rf"Scoped allocation with size {_SIZE} and limit {_SIZE}"),
    (None, rf"Allocation \(size={_SIZE}\) would exceed memory \(size={_SIZE}\).*?space=(\w+)"),
)
_LARGEST = re.compile(
    rf"\d+\. Size: {_SIZE}\s(?:\s*Operator: (?P<operator>.*)\s)?\s*Shape: (?P<shape>\S+)"
)


def memory_facts(compiled: jax.stages.Compiled, device_kind: str) -> dict[str, Any]:
    """Bytes per jax device of a compiled program, and whether they fit.

    Results that take the place of a donated argument are
    "aliased_bytes" and count once. "host_bytes" lie in the memory of the host.
    """
    memory = compiled.memory_analysis()
    arguments, outputs = memory.argument_size_in_bytes, memory.output_size_in_bytes
    aliased, temporary = memory.alias_size_in_bytes, memory.temp_size_in_bytes
    code = memory.generated_code_size_in_bytes
    peak = arguments + outputs - aliased + temporary + code
    hbm = chips.hbm_bytes(device_kind)
    host = ("argument", "output", "temp")
    return {
        "argument_bytes_per_device": arguments,
        "output_bytes_per_device": outputs,
        "aliased_bytes_per_device": aliased,
        "temporary_bytes_per_device": temporary,
        "code_bytes_per_device": code,
        "peak_bytes_per_device": peak,
        "host_bytes_per_device": sum(getattr(memory, f"host_{x}_size_in_bytes") for x in host)
        - memory.host_alias_size_in_bytes,
        "hbm_bytes_per_device": hbm,
        "fits": hbm is None or peak <= hbm,
    }


def describe_memory(facts: dict[str, Any], arguments: str, output: str) -> str:
    """Two lines about `memory_facts`, for a person: what the program is given, what it makes."""
    ends = "_bytes_per_device"
    gib = {name.removesuffix(ends): (facts[name] or 0) / 2**30 for name in facts if ends in name}
    excess = f"does not fit: {gib['peak'] - gib['hbm']:.2f} GiB too much"
    verdict = "fits" if facts["fits"] else excess
    donated = f" ({gib['aliased']:.2f} in place)" if facts["aliased_bytes_per_device"] else ""
    host = f"; {gib['host']:.2f} GiB on the host" if facts["host_bytes_per_device"] else ""
    of_hbm = "" if facts["hbm_bytes_per_device"] is None else f" of {gib['hbm']:.2f}"
    return (
        f"  per device     {arguments} {gib['argument']:.2f}, {output} {gib['output']:.2f}{donated}"
        f", temporaries {gib['temporary']:.2f} GiB{host}\n"
        f"  peak           {gib['peak']:.2f}{of_hbm} GiB per device: {verdict}"
    )


def compile_or_overflow(lowered: jax.stages.Lowered) -> jax.stages.Compiled | dict[str, Any]:
    """The program compiled, or the facts of `overflow` if it is too large for the device."""
    try:
        with _kept_in_no_cache():
            return lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        facts = overflow(error)
        if facts is None:
            raise
        return facts


@contextlib.contextmanager
def _kept_in_no_cache() -> Iterator[None]:
    """JAX cannot read back what was compiled for chips that are not here, and warns when it tries.

    So nothing that is compiled in the block is put into `JAX_COMPILATION_CACHE_DIR`.
    """
    name = "jax_persistent_cache_min_compile_time_secs"
    before = getattr(jax.config, name)
    jax.config.update(name, float("inf"))
    try:
        yield
    finally:
        jax.config.update(name, before)


def overflow(error: Exception) -> dict[str, Any] | None:
    """What the TPU compiler says about a program that is too large; None for another error.

    {"fits": False, "memory": "hbm" or "vmem", "needed_bytes", "available_bytes", "largest": the
    allocations that it names, {"bytes", "shape", "operator"}, if it names any, "message": a line
    for a person}. VMEM overflows where a kernel's blocks are too large.
    """
    text = str(error)
    if "RESOURCE_EXHAUSTED" not in text:
        return None
    for memory, pattern in _OVERFLOWS:
        found = re.search(pattern, text, re.DOTALL)
        if not found:
            continue
        groups = list(found.groups())
        if memory is None:  # named in the message, before or after the sizes
            memory = groups.pop(0 if groups[0].isalpha() else -1)
        needed, available = (
            round(float(number) * _UNITS[unit])
            for number, unit in zip(groups[::2], groups[1::2], strict=True)
        )
        largest = [
            {"bytes": round(float(m[1]) * _UNITS[m[2]]), "shape": m["shape"],
             "operator": "".join(re.findall(r'op_name="([^"]*)"', m["operator"] or ""))}
            for m in _LARGEST.finditer(text)
        ]  # fmt: skip
        kernel = re.search(r":: ([\w.-]+)\s*$", text)
        facts = {"fits": False, "memory": memory, "needed_bytes": needed,
                 "available_bytes": available, "largest": largest}  # fmt: skip
        return facts | {"message": _message(facts, kernel and kernel[1])}
    return {"fits": False, "memory": None, "needed_bytes": None, "available_bytes": None,
            "largest": [], "message": " ".join(text.split())[:300]}  # fmt: skip


def _message(facts: dict[str, Any], kernel: str | None) -> str:
    unit, name = (2**30, "GiB") if facts["memory"] == "hbm" else (2**20, "MiB")
    needed, available = facts["needed_bytes"] / unit, facts["available_bytes"] / unit
    where = f", in {kernel}" if kernel else ""
    lines = [
        f"does not fit: needs {needed:.2f} of {available:.2f} {name} of {facts['memory'].upper()} "
        f"per device, {needed - available:.2f} too much{where}"
    ]
    lines += [
        f"  {large['bytes'] / unit:8.2f} {name}  {large['shape']}  {large['operator']}".rstrip()
        for large in facts["largest"][:5]
    ]
    return "\n".join(lines)
