"""A program compiled, and what is known of it as lines for a person."""

import time
from collections.abc import Callable
from typing import Any

import jax

from ltx2_jax import units
from ltx2_jax.planning.compiled.facts import describe as describe_program
from ltx2_jax.planning.compiled.facts import program_facts
from ltx2_jax.planning.compiled.memory import compile_or_overflow, describe_memory, memory_facts
from ltx2_jax.planning.hosts import describe_hosts
from ltx2_jax.planning.topology import NO_COMPILER

GIB = 2**30
# Of a program: the names of what it is given and of what it makes, and one execution of it.
ENDS = {
    "train": ("state and batch", "new state", "a step"),
    "sample": ("weights", "latents", "for {steps}"),
    "text": ("weights", "contexts", "a batch"),
    "encode": ("weights", "latents", "a tile"),
    "decode": ("weights", "pixels", "a tile"),
}


def compile_facts(
    lowered: jax.stages.Lowered, mesh: jax.sharding.Mesh, model_flops: float | None
) -> dict[str, Any]:
    """Memory, work and time of a program for the devices of `mesh`, or why it does not fit."""
    kind = mesh.devices.flat[0].device_kind
    started = time.perf_counter()
    compiled = compile_or_overflow(lowered)
    seconds = round(time.perf_counter() - started, 1)
    facts = {"compiled": True, "device_kind": kind, "compile_seconds": seconds}
    if isinstance(compiled, dict):
        return facts | compiled
    facts |= memory_facts(compiled, kind)
    return facts | program_facts(compiled, mesh, model_flops=model_flops)


def describe(facts: dict[str, Any]) -> str:
    """The facts of a plan or a search as lines for a person."""
    what = facts["what"]
    if what == "search":
        return {"train": _search, "sample": _search_samples}[facts["of"]](facts)
    if what == "hosts":
        return describe_hosts(facts)
    if what == "clip":
        return _clip(facts)
    where = f"{facts['topology']} ({facts['devices']} x {facts['device_kind']})"
    title = f"{facts['program']} on {where}"
    if "message" in facts:
        return "\n".join([title, f"  {facts['message']}", *_helps(facts)])
    about = {"vae": _about_vae, "text": _about_text}.get(what, _about_transformer)
    before, after = about(facts)
    if not facts["compiled"]:
        return "\n".join([title, *before, *_uncompiled(facts), *_helps(facts)])
    given, made, execution = ENDS[facts.get("half", what)]
    execution = execution.format(steps=counted(facts.get("steps", 0), "step"))
    return "\n".join([
        title,
        *before,
        describe_memory(facts, given, made),
        *after,
        describe_program(facts, execution),
        f"  compiled in    {facts['compile_seconds']:.0f} s",
        *_helps(facts),
    ])  # fmt: skip


def counted(count: int, thing: str) -> str:
    """(1, "step") -> "1 step", (2, "pass") -> "2 passes"."""
    return f"{count} {thing}{('es' if thing.endswith('s') else 's') * (count > 1)}"


def _split(facts: dict[str, Any]) -> str:
    """{"rows": 2, "columns": 4} -> "2 rows, 4 columns"."""
    return ", ".join(f"{count:,} {axis}" for axis, count in facts["split"].items()) or "none"


def _about_transformer(facts: dict[str, Any]) -> tuple[list[str], list[str]]:
    """Lines before and after those about memory."""
    train = facts["what"] == "train"
    lines = [
        f"  split          {_split(facts)}" + (f", remat {facts['remat']}" if train else ""),
        f"  tokens         {facts['video_tokens']:,} video and {facts['audio_tokens']:,} audio a "
        f"clip, {facts['text_tokens']:,} of text",
        f"  parameters     {units.parameters(facts['parameters'])}, the transformer's",
        f"  model FLOPs    {units.flops(facts['model_flops'])}, "
        f"{units.flops(facts['model_flops'] / facts['devices'])} a device; nothing recomputed",
    ]
    if "replicated" in facts:
        whole = ", ".join(facts["replicated"]) or "none"
        lines.append(f"  whole on every chip, of the train state above 1 MiB: {whole}")
    return lines, []


def _about_text(facts: dict[str, Any]) -> tuple[list[str], list[str]]:
    return [
        f"  split          {facts['rows']} rows over {_split(facts)}",
        f"  parameters     {units.parameters(facts['parameters'])}; whole on every chip: "
        f"{', '.join(facts['whole_on_every_chip']) or 'none'}",
    ], [f"  FLOPs          {units.flops(facts['flops_of_batch'])} for the batch"]


def _about_vae(facts: dict[str, Any]) -> tuple[list[str], list[str]]:
    frames, height, width = facts["tile"]
    return [
        f"  largest tile   {frames} frames of {width}x{height}, split over {_split(facts)}",
        f"  parameters     {units.parameters(facts['parameters'])} in both halves",
    ], [
        f"  FLOPs          {units.flops(facts['flops_of_clip'])} for the clip; a tile "
        f"{units.flops(facts['flops_of_tile'])}",
        "  the largest tile",
    ]


def _uncompiled(facts: dict[str, Any]) -> list[str]:
    """Lines of what is known without the compiler."""
    hbm, fits = facts["hbm_bytes_per_device"], facts["fits"]
    if "estimate" not in facts:
        weights = facts["weight_bytes_per_device"]
        excess = "" if fits else f": {(weights - hbm) / GIB:.2f} GiB too much"
        return [
            f"  per device     weights {weights / GIB:.2f} of {hbm / GIB:.2f} GiB{excess}",
            f"  not compiled   {NO_COMPILER}",
        ]
    guess = facts["estimate"]
    parts = ", ".join(
        f"{name} {guess[name] / GIB:.1f}"
        for name in ("state", "gradients", "saved", "working", "weights")
    )
    slices = facts.get("slices", 1) > 1
    between = f", between slices {guess['between_slices']:.3g}" if slices else ""
    excess = f"should not fit: {(guess['peak'] - hbm) / GIB:.1f} GiB too much"
    return [
        f"  estimate       peak {guess['peak'] / GIB:.1f} of {hbm / GIB:.1f} GiB per device "
        f"({parts}): {'should fit' if fits else excess}",
        f"  estimate       {guess['step']:.3g} s a step, {guess['mfu']:.1%} MFU at practical rates "
        f"(compute {guess['compute']:.3g} s, HBM {guess['hbm']:.3g}, links {guess['links']:.3g}"
        f"{between})",
        f"  not compiled   {facts['why']}; these are estimates",
    ]


def _helps(facts: dict[str, Any]) -> list[str]:
    """What to change if a program does not fit, of the plans that know."""
    if "helps" not in facts:
        return []
    return [
        f"  by estimate    {change['change']} saves {change['saves'] / GIB:.1f} GiB"
        for change in facts["helps"][:4]
    ] or ["  by estimate    no single change helps on this slice: take a larger one"]


def _search(facts: dict[str, Any], most: int = 12) -> str:
    """The best rows of a search as a table."""
    lines = [
        f"train on {facts['topology']} ({facts['devices']} devices), best first; the estimates "
        "are by arithmetic",
        "  data model sequence  remat              batch    estimated: GiB    MFU"
        "    compiled: GiB    MFU  clips/s",
    ]
    for row in facts["rows"][:most]:
        data, model, sequence = row["mesh"]
        guess = row["estimate"]
        lines.append(
            f"  {data:4} {model:5} {sequence:8}  {row['remat']:<17} {row['batch']:6,} "
            f"{guess['peak'] / GIB:17.1f} {guess['mfu']:6.1%}{_compiled(row)}"
        )
    return "\n".join([*lines, *_unshown(facts, most)])


def _search_samples(facts: dict[str, Any], most: int = 12) -> str:
    """The fastest meshes of a search as a table, in milliseconds."""
    lines = [
        f"sample on {facts['topology']} ({facts['devices']} devices), fastest first: "
        f"{facts['work']}; the estimates are by arithmetic, and of one step",
        "  data model sequence    estimated: GiB      ms  products, memory, links    compiled: GiB"
        f"      ms for {counted(facts['steps'], 'step')}, of them waiting for links",
    ]
    for row in facts["rows"][:most]:
        data, model, sequence = row["mesh"]
        guess = row["estimate"]
        parts = ", ".join(f"{guess[k] * 1e3:.3g}" for k in ("products", "memory", "links"))
        line = f"  {data:4} {model:5} {sequence:8} {guess['peak'] / GIB:17.1f} "
        lines.append(f"{line}{guess['step'] * 1e3:7.1f}  {parts:<23}{_compiled_sample(row)}")
    return "\n".join([*lines, *_unshown(facts, most)])


def _unshown(facts: dict[str, Any], most: int) -> list[str]:
    """Lines about what a table of a search leaves out."""
    more = len(facts["rows"]) - most
    lines = [f"  and {more} more that should fit"] if more > 0 else []
    return lines + ([] if facts["compiled"] else [f"  not compiled   {facts['why']}"])


BOUNDS = {"compute": "FLOPs", "hbm": "HBM", "waited": "links", "stalled": "copies"}


def _clip(facts: dict[str, Any]) -> str:
    """The programs of a recipe as a table."""
    room = facts["hbm_bytes_per_device"] / GIB
    lines = [
        f"{facts['program']} on {facts['topology']} ({facts['devices']} x {facts['device_kind']})",
        f"  split          {_split(facts)}; each program has the memory to itself",
        f"  {'program':<34} runs  peak, GiB of {room:.1f}  seconds  most of them for",
    ]
    for row in facts["programs"]:
        plan, name = row["facts"], f"  {row['name']:<34} {row['times']:4}"
        if "message" in plan:
            lines.append(f"{name}  {plan['message']}")
            continue
        peak = plan["peak_bytes_per_device"] / GIB
        seconds = "      ?" if row["seconds"] is None else f"{row['seconds']:7.3f}"
        verdict = "" if plan["fits"] else "  does not fit"
        if host := plan.get("host_bytes_per_device"):
            verdict = f"; {host / GIB:.1f} GiB on the host{verdict}"
        lines.append(f"{name}  {peak:17.2f}  {seconds}  {BOUNDS.get(row['bound'], '?')}{verdict}")
    if facts["seconds"] is not None:
        longest = next(row for row in facts["programs"] if row["name"] == facts["longest"])
        share = longest["seconds"] / facts["seconds"]
        lines.append(
            f"  practical      {facts['seconds']:.3g} s a clip, {share:.0%} of them in "
            f"{longest['name']}; loading of weights and writing of files are beside it"
        )
    verdict = "every program fits" if facts["fits"] else "does not fit"
    return "\n".join([*lines, f"  {verdict}", f"  compiled in    {facts['compile_seconds']:.0f} s"])


def _compiled(row: dict[str, Any]) -> str:
    """Of a training: peak, MFU and clips a second."""
    return _if_compiled(row, lambda t: f"{t['mfu']:6.1%} {row['batch'] / t['step']:8.2f}", digits=1)


def _compiled_sample(row: dict[str, Any]) -> str:
    """Of a sampler: peak, and milliseconds of a step and of its waiting."""
    return _if_compiled(row, lambda t: f"{t['step'] * 1e3:7.1f} {t['waited'] * 1e3:7.1f}", digits=2)


def _if_compiled(
    row: dict[str, Any], numbers: Callable[[dict[str, float]], str], digits: int
) -> str:
    """GiB of the peak and some numbers of the times of a program, if it was compiled and fits."""
    plan = row["plan"]
    if plan is None:
        return ""
    if not plan["fits"]:
        return "    does not fit"
    peak = plan["peak_bytes_per_device"] / GIB
    return f"{peak:17.{digits}f} {numbers(plan['roofline']['practical'])}"
