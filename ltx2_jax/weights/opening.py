"""The one way to open weights, wherever they are and in whatever layout."""

import os
from pathlib import Path

from ltx2_jax.errors import UserError
from ltx2_jax.weights import hub
from ltx2_jax.weights.folder import INDEX, WeightsFolder
from ltx2_jax.weights.names import gemma
from ltx2_jax.weights.release import Release
from ltx2_jax.weights.tensor_files import TensorFile


def open_release(*sources: str | os.PathLike) -> Release:
    """Opens released files, or a folder of weights in our own layout.

    Args:
      sources: files; folders, for all files in them (a Hugging Face folder with config.json for its
        language model); names on the Hugging Face Hub, as `hub.fetch` takes them; or one folder
        that `Export.save` wrote.

    Raises:
      UserError: a source that is missing or not what it should be; see `Release`.
    """
    paths: list[Path] = []
    gemma_config = None
    for source in sources:
        path = hub.fetch(source)
        if (path / INDEX).is_file():
            if len(sources) > 1:
                raise UserError(f"{path}: a folder of weights is opened alone")
            return WeightsFolder(path)
        if not path.is_dir():
            paths.append(path)
        elif (path / "config.json").is_file():
            gemma_config = gemma.read_json(path / "config.json")
            paths += gemma.weight_files(path)
        else:
            found = sorted(p for p in path.rglob("*.safetensors") if not p.name.startswith("."))
            if not found:
                raise UserError(f"{path}: has no safetensors files")
            announced = [f for index in path.rglob("*.index.json") for f in gemma.indexed(index)]
            gemma.check_shards(path, {*gemma.numbered(found), *announced}.difference(found))
            paths += found
    files: list[TensorFile] = []
    try:
        for path in paths:
            files.append(TensorFile(path))
        return Release(files, ", ".join(map(str, sources)), gemma_config)
    except UserError:
        for file in files:
            file.close()
        raise
