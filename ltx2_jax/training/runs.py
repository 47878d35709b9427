"""What a training run left in its workdir: its config and its weights, out of its checkpoints."""

from pathlib import Path
from typing import Any

import jax

from ltx2_jax.config import Config
from ltx2_jax.errors import UserError
from ltx2_jax.files import location
from ltx2_jax.models import ltx2
from ltx2_jax.sharding import sharding_of
from ltx2_jax.training import initial
from ltx2_jax.training.checkpoint import FOLDER, Checkpoints, DamagedCheckpoint


def stored_config(workdir: str | Path) -> Config | None:
    """The config in the newest checkpoint of a workdir; None where there is no checkpoint yet.

    One that is damaged is passed over if there is another.

    Raises:
      UserError: all are damaged, or it is of another version.
    """
    if not (location(workdir) / FOLDER).is_dir():
        return None
    damaged = None
    with Checkpoints(workdir) as checkpoints:
        for step in reversed(checkpoints.steps):
            try:
                return checkpoints.config(step)
            except DamagedCheckpoint as error:
                damaged = damaged or error
    if damaged is not None:
        raise damaged
    return None


def weights_of_run(
    workdir: str | Path,
    mesh: jax.sharding.Mesh,
    *,
    step: int | None = None,
    average: bool = True,
    for_sampling: bool = False,
    adapters: bool = False,
) -> tuple[Config, dict[str, Any], int]:
    """Config, weights on `mesh` and step of a training run: averaged weights if it averaged.

    Of a run that tuned a part of its weights they are all, its adapters merged; those for sampling
    of a run with quantised weights are as `trainable.as_sampled` has them.

    Args:
      workdir: of the run.
      mesh: where the weights go.
      step: of the checkpoint; the newest when None.
      average: False takes the last weights even if there are averaged ones.
      for_sampling: on the mesh and in the dtypes in which a sampler keeps them, not a train state.
      adapters: of a run that trains adapters, only these.

    Raises:
      UserError: no workdir, no checkpoint there, or none of `step`; of a run that tuned, the
        weights that it began from are not there, or are others.
    """
    with Checkpoints(workdir) as checkpoints:
        step = checkpoints.latest_step if step is None else step
        if step is None or step not in checkpoints.steps:
            raise UserError(f"{workdir}: no checkpoint{'' if step is None else f' {step}'} there")
        config = checkpoints.config(step)
        name = "ema" if average and config.optim.ema_decay is not None else "params"
        if config.tune is None:
            abstract = ltx2.abstract_params(config.networks, mesh, for_sampling=for_sampling)
            return config, checkpoints.restore_part(step, {name: abstract})[name], step
        homes = initial.trained_homes(config, mesh, for_sampling=for_sampling)
        base = jax.ShapeDtypeStruct((2,), "uint32", sharding=sharding_of(mesh))
        found = checkpoints.restore_part(step, {name: homes, "base": base})
    trained, base = found[name], found["base"]
    if adapters:
        return config, trained, step
    whole = initial.whole(config, trained, base, mesh, for_sampling=for_sampling)
    return config, whole, step
