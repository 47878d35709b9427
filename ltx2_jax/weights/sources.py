"""The one way to open weights, wherever they are and in whatever layout."""

import os
from collections import defaultdict
from pathlib import Path

from ltx2_jax.errors import UserError
from ltx2_jax.weights import hub
from ltx2_jax.weights.lora_files import ADAPTERS, lora_file
from ltx2_jax.weights.names import gemma
from ltx2_jax.weights.release import Release, tensors_of, use_of_lora
from ltx2_jax.weights.tensor_files import TensorFile


def open_release(*sources: str | os.PathLike) -> Release:
    """Opens released files.

    Args:
      sources: files; folders, for all files in them (a Hugging Face folder with config.json for its
        language model); or names on the Hugging Face Hub, as `hub.fetch` takes them.

    Raises:
      UserError: a source that is missing or not what it should be; see `Release`.
    """
    paths: list[Path] = []
    folders: list[Path] = []
    gemma_config = None
    for source in sources:
        path = hub.fetch(source)
        if not path.is_dir():
            paths.append(path)
        elif (path / "config.json").is_file():
            gemma_config = gemma.read_json(path / "config.json")
            paths += gemma.weight_files(path)
        else:
            folders.append(path)
            paths += _files_of(path)
    files: list[TensorFile] = []
    try:
        for path in paths:
            files.append(TensorFile(path))
        try:
            return Release(files, ", ".join(map(str, sources)), gemma_config)
        except UserError:
            for folder in folders:
                _refuse_several(folder, [file for file in files if folder in file.path.parents])
            raise
    except UserError:
        for file in files:
            file.close()
        raise


def _files_of(folder: Path) -> list[Path]:
    """The safetensors files of a folder without config.json; UserError if it is no such thing."""
    index = folder / "weights.json"
    if index.is_file() and "ltx2_jax.weights." in index.read_text("utf-8", errors="replace"):
        raise UserError(
            f"{folder}: is a folder of weights as an earlier version wrote it, which this version "
            "does not read; use the official file that it was made from (a training run: convert "
            "its workdir again)"
        )
    if (adapter := lora_file(folder)).name in ADAPTERS:
        raise UserError(
            f"{folder}: holds a LoRA ({adapter.name}), not a model; {use_of_lora(folder)}"
        )
    found = sorted(folder.glob("*.safetensors"))
    if (folder / "model_index.json").is_file() and not found:
        raise UserError(
            f"{folder}: is a model in the layout of diffusers, which is not read; use a file as "
            "Lightricks released it"
        )
    if not (folder / "model_index.json").is_file():  # else folders in it are those of diffusers
        found = sorted(folder.rglob("*.safetensors"))
    found = [path for path in found if not path.name.startswith(".")]
    if not found:
        other = sorted(p.name for p in folder.iterdir() if p.suffix in (".gguf", ".bin", ".pt"))
        has = f" (but {', '.join(other)}, which is not read)" if other else ""
        raise UserError(f"{folder}: has no safetensors files{has}")
    announced = [f for index in folder.rglob("*.index.json") for f in gemma.indexed(index)]
    gemma.check_shards(folder, {*gemma.numbered(found), *announced})
    return found


def _refuse_several(folder: Path, files: list[TensorFile]) -> None:
    """UserError if files of a folder hold the same tensors, and so several models."""
    holders: dict[tuple[str, str], list[Path]] = defaultdict(list)
    for file in files:
        for tensor in tensors_of(file):
            holders[tensor].append(file.path)
    for network in ("transformer", *sorted({network for network, _ in holders})):
        shared = (paths for (n, _), paths in holders.items() if n == network and len(paths) > 1)
        if several := sorted({path for paths in shared for path in paths}):
            names = ", ".join(str(path.relative_to(folder)) for path in several)
            rest = "" if network == "transformer" else ", with the other files of the model"
            raise UserError(
                f"{folder}: holds several models: {names} each have a {network.replace('_', ' ')}; "
                f"in place of the folder give one of them{rest}, such as {several[0]}"
            ) from None
