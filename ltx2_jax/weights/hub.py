"""Files on the Hugging Face Hub, by the optional package `huggingface_hub` (the `hub` extra)."""

import os
import re
from pathlib import Path
from typing import Any

from ltx2_jax.errors import UserError
from ltx2_jax.files import reason

_NAME = re.compile(r"(hf://)?(\w[\w.-]*/\w[\w.-]*)((?:/[\w. -]+)*)/?")
# What a folder of weights needs besides them: configs and tokenizers.
_FOLDER = ("*.safetensors", "*.json", "*.model", "*.jinja")
# Without it, the weights beside it are not all there is to know: of a language model, of a LoRA.
_CONFIGS = ("config.json", "adapter_config.json")


def fetch(source: str | os.PathLike) -> Path:
    """A path that exists: `source` itself, or what it names on the Hub, downloaded into its cache.

    Interrupted downloads are resumed, and nothing is downloaded twice.

    Args:
      source: a path; or "ORG/REPO/FILE", "ORG/REPO" of a repository that is one folder of weights
        or has one file of them, or "ORG/REPO/FOLDER". With "hf://" in front, it is no path.

    Raises:
      UserError: no such file, here or there; a gated repository; no network.
    """
    text = os.fspath(source)
    match = _NAME.fullmatch(text)
    if match is None or (match[1] is None and _is_local(text, match[2])):
        if not Path(text).exists():
            raise UserError(f"{text}: no such file or folder")
        return Path(text)
    try:
        import huggingface_hub
    except ImportError:
        raise UserError(
            f"{text}: no such file or folder; if it is meant to be on the Hugging Face Hub: "
            "pip install 'ltx2-jax[hub]'"
        ) from None
    try:
        return _download(huggingface_hub, match[2], match[3].strip("/"))
    except UserError:
        raise
    except Exception as error:  # of the package, of its HTTP library, of the system
        raise UserError(f"{text}: {_explained(error, match[2])}") from None


def _is_local(text: str, repo: str) -> bool:
    """Whether a name that could be a repository's is a path, perhaps a mistyped one."""
    path = Path(text)
    return path.exists() or path.parent.exists() or repo.endswith(".safetensors")


def _download(hub: Any, repo: str, inner: str) -> Path:
    if Path(inner).suffix and Path(inner).name != "adapter_model.safetensors":
        return Path(hub.hf_hub_download(repo, inner))
    names = hub.list_repo_files(repo)
    if Path(inner).suffix:
        return _with_config(hub, repo, inner, names)
    start = f"{inner}/" if inner else ""
    weights = [name for name in names if name.startswith(start) and name.endswith(".safetensors")]
    has_config = any(start + config in names for config in _CONFIGS)
    if not weights:
        raise UserError(f"{repo}: has no safetensors files{f' in {inner}' if inner else ''}")
    if len(weights) == 1 and not has_config:
        return Path(hub.hf_hub_download(repo, weights[0]))
    if not inner and not has_config:
        raise UserError(f"{repo}: name one of its files: {', '.join(sorted(weights))}")
    patterns = [start + pattern for pattern in _FOLDER]
    return Path(hub.snapshot_download(repo, allow_patterns=patterns)) / inner


def _with_config(hub: Any, repo: str, file: str, names: list[str]) -> Path:
    """A LoRA file of PEFT, whose scales are in a file beside it."""
    config = str(Path(file).with_name("adapter_config.json"))
    if config in names:
        hub.hf_hub_download(repo, config)
    return Path(hub.hf_hub_download(repo, file))


def _explained(error: Exception, repo: str) -> str:
    """One line about what the package raised, and what to do."""
    kinds = {kind.__name__ for kind in type(error).__mro__}
    if "GatedRepoError" in kinds:
        return (
            f"{repo} is gated: accept its terms at https://huggingface.co/{repo}, then log in with "
            "`hf auth login` (or set HF_TOKEN)"
        )
    if "RepositoryNotFoundError" in kinds:
        return (
            "no such file or folder, and no repository of that name on the Hugging Face Hub (a "
            "private one needs `hf auth login`)"
        )
    if "EntryNotFoundError" in kinds and "LocalEntryNotFoundError" not in kinds:
        return f"{repo} has no such file"
    return f"cannot be downloaded from the Hugging Face Hub ({reason(error):.200})"
