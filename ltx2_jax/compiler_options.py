"""What we ask of the TPU compiler beyond its defaults."""

from ltx2_jax import chips
from ltx2_jax.sharding import target

# Weights of the next matrix products are gathered while the present one runs.
_GATHER_AHEAD = {
    "xla_enable_async_all_gather": True,
    "xla_tpu_enable_async_collective_fusion": True,
    "xla_tpu_enable_async_collective_fusion_fuse_all_gather": True,
    "xla_tpu_enable_async_collective_fusion_multiple_steps": True,
    "xla_tpu_overlap_compute_collective_tc": True,
}
# Otherwise the stacked weights of a v7x are copied into another layout before the loop over them.
_STORED_LAYOUT = {"xla_tpu_control_large_2nd_minor_layout_for_x16": 0}
OPTIONS: dict[str, dict[str, bool | int]] = {
    "v4": _GATHER_AHEAD,
    "v5e": _GATHER_AHEAD,
    "v5p": _GATHER_AHEAD,
    "v6e": _GATHER_AHEAD,
    "v7x": _STORED_LAYOUT,
}


def compiler_options() -> dict[str, bool | int] | None:
    """For the `compiler_options` of `jax.jit`, by the chip of the mesh in context; None: defaults.

    To be called under the `jax.set_mesh` that the program runs under.
    """
    platform, kind = target()
    chip = chips.of_kind(kind)
    return OPTIONS.get(chip.name) if platform == "tpu" and chip is not None else None
