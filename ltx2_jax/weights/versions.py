"""`model_version` in released metadata, and the release of models that it means."""

import warnings
from collections.abc import Mapping
from typing import Any

RELEASES = {(2, 0): "2.0", (2, 3): "2.3", (2, 5): "2.5"}
# Before (2, 4) a version is of the release below it; from then on upstream takes all for 2.5.
_NEW_TEXT_ENCODER = (2, 4)


def numbers(version: Any) -> tuple[int, int, int]:
    """The leading numbers of a version: "2.4-rc2" -> (2, 4, 0); none at all is (0, 0, 0)."""
    found: list[int] = []
    for part in str(version or "").replace("-", ".").split("."):
        if not part.isdigit():
            break
        found.append(int(part))
    return tuple((*found, 0, 0, 0)[:3])


def release_of(version: Any) -> str:
    """The release whose latents and features a version has: "2.3.rc1" -> "2.3"; "" of none.

    Warns (UserWarning) where the version is of no known release and the closest one is taken.
    """
    found = numbers(version)[:2]
    if found == (0, 0):
        return ""
    if found in RELEASES:
        return RELEASES[found]
    older = [known for known in RELEASES if known <= found]
    closest = (2, 5) if found >= _NEW_TEXT_ENCODER else max(older, default=(2, 0))
    warnings.warn(
        f"model_version={version} is unknown; taken for LTX-2 {RELEASES[closest]}, the closest "
        "that is known",
        stacklevel=2,
    )
    return RELEASES[closest]


def release_of_config(transformer: Mapping[str, Any]) -> str:
    """The release that the `transformer` section of a config describes."""
    if not transformer.get("caption_proj_before_connector", False):
        return "2.0"
    newest = not transformer.get("ff_bias", True) or transformer.get(
        "use_keyframes_abs_pos_embedding", False
    )
    return "2.5" if newest else "2.3"
