"""Guidance of any kind in the denoising loop: what a call combines, remembers and leaves out."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from ltx2_jax.diffusion import guidance
from ltx2_jax.diffusion.guidance import Guidance
from ltx2_jax.diffusion.sampler import NOTHING, Estimate, Given, Latents, nothing, of_streams
from ltx2_jax.diffusion.steppers import Memory, Row
from ltx2_jax.errors import UserError

Pair = tuple[Array, Array]  # numbers of video and of audio: [], or [n] for each of n steps


@dataclass(frozen=True)
class Guided:
    """The estimate under the prompt, moved away from those of other passes."""

    passes: Callable[..., list[Latents]]  # of `sampler.all_passes`, that under the prompt first
    strengths: Sequence[Pair]  # of the others
    rescales: Pair | None = None  # factors of `guidance.rescale`
    how: Guidance = Guidance()  # noqa: RUF009
    uncond: int | None = None  # which of the others is without a prompt
    given: Given = NOTHING

    def __post_init__(self):
        if self.uncond is None and self.how.direction != "difference":
            raise UserError(f"guidance {self.how.direction!r} needs the pass without a prompt")

    def rows(self, steps: np.ndarray, inner: np.ndarray) -> Row:
        count = steps[-1] + (inner.max() == 0)  # a call after the last step is of no step
        row = {}
        for i, number in enumerate(self._leaves()):
            if jnp.ndim(number):
                if number.shape[0] != count:
                    raise UserError(f"{number.shape[0]} numbers of guidance for {count} steps")
                row[f"number {i}"] = number[np.minimum(steps, count - 1)]
        if self.skips:
            # A step that is skipped is so at its first call: the others have points of their own.
            video, audio = (guidance.skipped(steps, k) & (inner == 0) for k in self._skip_steps())
            row["skipped"] = jnp.asarray(np.searchsorted(self._kinds(), video + 2 * audio))
        return row

    def begin(self, x: Latents) -> Memory:
        zeros = of_streams(jnp.zeros_like, x)
        return {name: zeros for name in ("x0",) * self.skips + ("average",) * self._averages}

    def find(self, x: Latents, row: Row, memory: Memory) -> tuple[Estimate, Memory]:
        if not self.skips:
            return self._run(x, row, memory)

        def all_run(memory: Memory) -> tuple[Estimate, Memory]:
            estimate, memory = self._run(x, row, memory)
            return Estimate(estimate.x0), memory

        def one_runs(enabled: tuple[bool, bool], memory: Memory) -> tuple[Estimate, Memory]:
            """The other is read as it is, and its last estimate serves."""
            _, new = self._run(x, row, memory, enabled=enabled)
            for name, old in memory.items():
                streams = zip(new[name], old, enabled, strict=True)
                new[name] = Latents(*(a if runs else b for a, b, runs in streams))
            return Estimate(new["x0"]), new

        def none_runs(memory: Memory) -> tuple[Estimate, Memory]:
            return Estimate(memory["x0"]), memory

        kinds = [
            all_run,
            lambda memory: one_runs((False, True), memory),
            lambda memory: one_runs((True, False), memory),
            none_runs,
        ]
        return jax.lax.switch(row["skipped"], [kinds[i] for i in self._kinds()], memory)

    def _run(self, x: Latents, row: Row, memory: Memory, **enabled: Any) -> tuple[Estimate, Memory]:
        """One call of the network."""
        leaves = [row.get(f"number {i}", number) for i, number in enumerate(self._leaves())]
        strengths, rescales = self._tree().unflatten(leaves)
        cond, *others = self.passes(x, row["sigma"], **enabled)
        found, averages = [None, None], [None, None]
        for i, estimate in enumerate(cond):
            if estimate is None:
                continue
            average = memory["average"][i] if self._averages else None
            theirs = [other[i] for other in others]
            directions, averages[i] = self._directions(estimate, theirs, average)
            found[i] = guidance.moved(estimate, directions, [pair[i] for pair in strengths])
            if rescales is not None:
                found[i] = guidance.rescale(
                    found[i], estimate, rescales[i], per_sample=self.how.per_sample
                )
        x0 = Latents(*found)
        new = {"x0": x0, "average": Latents(*averages)}
        uncond = None if self.uncond is None else others[self.uncond]
        return Estimate(x0, uncond), {name: new[name] for name in memory}

    def _directions(
        self,
        cond: Array,  # [B, T, C]
        others: Sequence[Array],  # [B, T, C]
        average: Array | None,  # [B, T, C]
    ) -> tuple[list[Array], Array | None]:
        """Where strengths move one stream's estimate to, and the average of stateful APG."""
        how = self.how
        directions = [cond.astype(jnp.float32) - other.astype(jnp.float32) for other in others]
        if how.direction == "star":
            directions[self.uncond] = guidance.star(cond, others[self.uncond])
        if how.direction == "apg":
            difference = directions[self.uncond]
            if average is not None:
                difference = average = how.apg_momentum * average + difference
            numbers = {"eta": how.apg_eta, "norm": how.apg_norm, "axes": (-2, -1)}
            directions[self.uncond] = guidance.apg(cond, difference, **numbers)
        return directions, average

    @property
    def skips(self) -> bool:
        return any(self._skip_steps())

    @property
    def _averages(self) -> bool:
        return self.how.direction == "apg" and self.how.apg_momentum != 0

    def _skip_steps(self) -> tuple[int, int]:
        """A stream that is not generated does as the other one."""
        video, audio = self.how.skip_steps
        fixed = [not nothing(self.given) and (c is None or c.frozen) for c in self.given]
        return (audio if fixed[0] else video), (video if fixed[1] else audio)

    def _kinds(self) -> list[int]:
        """Which combinations of skipped streams occur: 1 for the video and 2 for the audio.

        The network is compiled once for each but 3.
        """
        video, audio = self._skip_steps()
        if video == audio:
            return [0, 3]
        return [0, 1] if not audio else [0, 2] if not video else [0, 1, 2, 3]

    def _leaves(self) -> list[Array]:
        return jax.tree.leaves((self.strengths, self.rescales))

    def _tree(self) -> Any:
        return jax.tree.structure((self.strengths, self.rescales))
