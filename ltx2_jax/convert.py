"""Weights between layouts, LoRA files in and out of them: python -m ltx2_jax.convert --help."""

import argparse
import contextlib
import json
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from ltx2_jax import command
from ltx2_jax.command import count
from ltx2_jax.config import Config
from ltx2_jax.data.records import read_schema
from ltx2_jax.errors import UserError
from ltx2_jax.fields import difference
from ltx2_jax.files import location
from ltx2_jax.sharding import make_mesh
from ltx2_jax.training import checkpoint, initial, objective, runs
from ltx2_jax.weights import export, report
from ltx2_jax.weights import lora as loras
from ltx2_jax.weights.loading import FLOAT8
from ltx2_jax.weights.release import Release, looks_like_lora
from ltx2_jax.weights.sources import open_release
from ltx2_jax.weights.tensor_files import TensorFile
from ltx2_jax.weights.writing import check_writable

RANK = 64  # of an extracted LoRA

DESCRIPTION = """\
Make official files of weights: of training runs, of several files, with LoRA files merged in; make
LoRA files; look into files. A run that trained adapters becomes a LoRA file, or, with --base, that
model with the adapters merged in.

SRC is an official file, several of them (a split pack), a folder of files, a name on the Hugging
Face Hub, the workdir of a training run, or a LoRA (a file, or the folder in which diffusers or PEFT
saved one). DST is a .safetensors file. It appears whole or not at all, and is never replaced.
Tensors that nothing changes are copied byte by byte, float8 with its scales.
"""

EXAMPLE = """\
example:
  python -m ltx2_jax.convert workdir/mine mine.safetensors --base ltx-2-19b-dev.safetensors \\
      --dtype bfloat16
  python -m ltx2_jax.convert ltx-2-19b-dev.safetensors merged.safetensors \\
      --lora style.safetensors 0.8
  python -m ltx2_jax.convert mine.safetensors mine-lora.safetensors \\
      --extract-lora ltx-2-19b-dev.safetensors --rank 64
  python -m ltx2_jax.convert kohya-lora.safetensors official-lora.safetensors
  python -m ltx2_jax.convert --inspect ltx-2-19b-dev.safetensors style.safetensors
"""


def main(args: argparse.Namespace) -> None:
    """Looks into files, or reads SRC and writes DST."""
    if args.inspect:
        _refuse(args, "--inspect", "dtype", "base", "step", "lora", "extract_lora", "rank")
        for i, path in enumerate(args.paths):
            print("\n" * (i > 0) + inspect(path))
        return
    if len(args.paths) < 2:
        raise UserError("SRC and DST are needed (or --inspect)")
    *sources, dst = args.paths
    if Path(dst).exists():
        raise UserError(f"{dst}: exists already")
    if Path(dst).suffix != ".safetensors":
        name = Path(dst).with_suffix(".safetensors")
        raise UserError(f"{dst}: weights are written as a safetensors file: name it {name}")
    if args.extract_lora:
        _refuse(args, "--extract-lora", "base", "step", "lora")
        extract_lora(sources, dst, args)
        print(f"wrote {dst}")
        return
    if args.rank:
        raise UserError("--rank: is that of --extract-lora, which is not given")
    if _is_lora(sources[0]):
        _refuse(args, f"the LoRA file {sources[0]}", "lora", "base", "step")
        convert_lora(sources, dst, args)
    elif _is_workdir(sources[0]):
        _refuse(args, f"the run {sources[0]}: convert it first, then merge into the file", "lora")
        tune = _config_of_run(sources[0]).tune
        of_adapters = tune is not None and tune.lora is not None
        (convert_adapters if of_adapters else convert_run)(sources, dst, args)
    else:
        _refuse(args, sources[0], "step")
        convert_release(sources, dst, args)
    print(f"wrote {dst}")


def convert_lora(sources: Sequence[str], dst: str, args: argparse.Namespace) -> None:
    """Another tool's LoRA file to an official one."""
    source = _alone(sources, "a LoRA file")
    loras.write_lora(dst, loras.read_lora(source), dtype=args.dtype)


def convert_release(sources: Sequence[str], dst: str, args: argparse.Namespace) -> None:
    """Released files to one file, with LoRA files merged and what they lack from --base."""
    with contextlib.ExitStack() as stack:
        release = stack.enter_context(open_release(*sources))
        if args.dtype and not set(export.TRAINED) & set(release.networks):
            raise UserError(f"--dtype: {release.name} has neither transformer nor connectors")
        # What is not touched is copied byte by byte; LoRA files touch the transformer alone.
        raw = set(release.networks) - ({"transformer"} if args.lora else set())
        base = stack.enter_context(open_release(args.base)) if args.base else None
        if base is not None:
            release.describe_by(base)
        out = export.of_release(release, param_dtype=args.dtype, raw=raw)
        if args.lora:
            given = [(loras.read_lora(path), Path(path).name, rest) for path, *rest in args.lora]
            _merge(out, release, [(lora, name, _strength(rest)) for lora, name, rest in given])
        for network in sorted(set(out.names) - set(out.raw)):
            if {s.stored.dtype for s in release.networks[network].tensors.values()} & set(FLOAT8):
                print(f"{network}: its float8 weights become {args.dtype or 'bfloat16'}")
        (out if base is None else out.over(base)).write(dst, progress=True)


def convert_run(sources: Sequence[str], dst: str, args: argparse.Namespace) -> None:
    """The weights of a training run, with all other networks from --base."""
    workdir = _alone(sources, "a training run")
    mesh = make_mesh(devices=jax.devices()[:1])
    config, params, step = runs.weights_of_run(workdir, mesh, step=args.step)
    print(f"{workdir}: weights of step {step}")
    with contextlib.ExitStack() as stack:
        base = stack.enter_context(open_release(args.base)) if args.base else None
        out = initial.as_export(config, params, base=base, param_dtype=args.dtype)
        out.write(dst, progress=True)


def convert_adapters(sources: Sequence[str], dst: str, args: argparse.Namespace) -> None:
    """The adapters of a training run as a LoRA file, or merged into the model --base."""
    workdir = _alone(sources, "a training run")
    check_writable(Path(dst))
    mesh = make_mesh(devices=jax.devices()[:1])
    config, trained, step = runs.weights_of_run(workdir, mesh, step=args.step, adapters=True)
    lora = initial.as_lora(config, trained, **_references(config, Path(workdir)))
    print(f"{workdir}: adapters of step {step}, {len(lora.targets)} matrices")
    if args.base is None:
        loras.write_lora(dst, lora, dtype=args.dtype or "bfloat16")
        return
    with open_release(args.base) as base:
        initial.check_same(config, base)
        raw = set(base.networks) - {"transformer"}
        out = export.of_release(base, param_dtype=args.dtype, raw=raw)
        _merge(out, base, [(lora, Path(workdir).name, 1.0)])
        out.write(dst, progress=True)


def extract_lora(sources: Sequence[str], dst: str, args: argparse.Namespace) -> None:
    """The difference between two transformers as a LoRA file, read parameter by parameter."""
    check_writable(Path(dst))
    with open_release(*sources) as tuned, open_release(args.extract_lora) as before:
        tuned.describe_by(before)
        config = before.config("transformer")
        if lines := difference(config, tuned.config("transformer"), ""):
            raise UserError(
                f"{before.name}: is another transformer than {tuned.name} ({'; '.join(lines)})"
            )
        wanted = [release.parameters("transformer", config) for release in (before, tuned)]
        found, missed = loras.extract(
            before.stream("transformer", wanted[0]),
            tuned.stream("transformer", wanted[1]),
            args.rank or RANK,
            total=len(wanted[0]),
        )
        if not found.targets:
            raise UserError(f"{before.name} and {tuned.name} have the same matrices")
        version = {"model_version": tuned.version()} if tuned.version() else {}
        found = loras.Lora(found.targets, version)
        loras.write_lora(dst, found, dtype=args.dtype or "bfloat16")
    print(f"{len(found.targets)} matrices; the squared difference that is left: {missed:.2%}")


def inspect(path: str) -> str:
    """What is in a file, folder or workdir, in lines."""
    if _is_lora(path):
        return report.of_lora(loras.read_lora(path))
    if _is_workdir(path):
        with checkpoint.Checkpoints(path) as checkpoints:
            step = checkpoints.latest_step
            if step is None:
                raise UserError(f"{path}: no checkpoint there")
            config = checkpoints.config(step)
        lines = [str(path), f"training run, step {step}"]
        lines.append(report.describe("transformer", config.model))
        if config.tune is not None:
            lora = config.tune.lora
            what = ", ".join(config.tune.train) if lora is None else f"a LoRA of rank {lora.rank}"
            form = f", in {config.tune.quantize}" if config.tune.quantize else ""
            lines.append(f"trained: {what}; the rest is that of {config.init_from}{form}")
        return "\n  ".join(lines)
    with open_release(path) as release:
        return report.of_release(release)


def _merge(
    out: export.Export, release: Release, given: Sequence[tuple[loras.Lora, str, float]]
) -> None:
    """Puts LoRAs, each with a name and a strength, into the transformer on its way."""
    config = release.config("transformer")
    for lora, _, _ in given:
        loras.check(lora, config, release.release_of("transformer"))
    pairs = [(lora, strength) for lora, _, strength in given]
    stream = out.streams["transformer"]
    out.streams["transformer"] = lambda: loras.fuse_stream(stream(), pairs, config)
    merged = json.loads(out.metadata.get("merged_loras", "[]"))
    merged += [{"file": name, "strength": strength} for _, name, strength in given]
    out.metadata["merged_loras"] = json.dumps(merged)


def _strength(given: Sequence[str]) -> float:
    try:
        (value,) = given or ("1",)
        value = float(value)
    except ValueError:
        raise UserError(f"--lora: {' '.join(given)!r} is not one number, the strength") from None
    if not np.isfinite(value):
        raise UserError(f"--lora: strength {value} is not finite")
    return value


def _is_lora(source: str) -> bool:
    if source.startswith("gs://"):  # a run alone may lie there
        return False
    path = loras.lora_file(source)
    if not path.is_file():
        return False
    with TensorFile(path) as file:
        return looks_like_lora(file.tensors)


def _alone(sources: Sequence[str], what: str) -> str:
    if len(sources) > 1:
        raise UserError(f"{sources[0]}: {what} is converted alone, not with {sources[1]}")
    return sources[0]


def _is_workdir(path: str) -> bool:
    place = location(path) if path.startswith("gs://") else Path(path)
    return (place / checkpoint.FOLDER).is_dir()


def _references(config: Config, workdir: Path) -> dict[str, str]:
    """What the adapters of a run say of the clips that they refer to."""
    if all(what.kind != "reference" for what in config.flow.conditions("video")):
        return {}
    fields = read_schema(workdir / checkpoint.ASSETS).fields
    shapes = {name: field.shape for name, field in fields.items()}
    return loras.reference_metadata(*objective.reference_factors(config.flow, shapes))


def _config_of_run(workdir: str) -> Config:
    config = runs.stored_config(workdir)
    if config is None:
        raise UserError(f"{workdir}: no checkpoint there")
    return config


def _refuse(args: argparse.Namespace, what: str, *flags: str) -> None:
    for flag in flags:
        if getattr(args, flag):
            raise UserError(f"--{flag.replace('_', '-')}: not for {what}")


def cli(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code, see `command.run`."""
    args = _parser().parse_args(argv)
    if not args.extract_lora:
        # Conversion is work of the host; a single accelerator may not hold the weights.
        jax.config.update("jax_platforms", "cpu")
    with warnings.catch_warnings():
        warnings.showwarning = _show_warning
        warnings.simplefilter("always", UserWarning)
        return command.run("convert", lambda: main(args), interrupted="nothing was written")


def _show_warning(message: Any, *_: Any, **__: Any) -> None:
    print(f"convert: warning: {message}", file=sys.stderr)


def _parser() -> argparse.ArgumentParser:
    usage = "%(prog)s SRC ... DST [options]\n       %(prog)s --inspect PATH ..."
    parser = command.parser("convert", DESCRIPTION, EXAMPLE, usage=usage)
    add = parser.add_argument
    add("paths", nargs="+", metavar="PATH", help="what to convert, and to what")
    add("--inspect", action="store_true", help="print what is in every path, and write nothing")
    add(
        "--dtype",
        choices=("bfloat16", "float32"),
        help="of transformer and connectors, or a LoRA (default: as stored, but bfloat16 of float8 "
        "into which a LoRA is merged, and of an extracted LoRA, or that of a run)",
    )
    add("--base", metavar="FILE", help="a release to take from what SRC lacks (VAEs, vocoder, ...)")
    add("--step", type=count, metavar="N", help="of a run: the checkpoint (default: the newest)")
    add("--lora", nargs="+", action="append", default=[], metavar=("FILE", "STRENGTH"),
        help="merge a LoRA file into the transformer (strength 1); may be given again")  # fmt: skip
    add("--extract-lora", metavar="FILE", help="write the difference from FILE as a LoRA file")
    add("--rank", type=count, metavar="N", help=f"of --extract-lora ({RANK})")
    return parser


if __name__ == "__main__":
    sys.exit(cli())
