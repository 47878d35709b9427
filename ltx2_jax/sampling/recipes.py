"""Ways of making a clip, as data: a recipe is a list of stages, and each number can be replaced.

    recipe = recipes.choose("2.3", "distilled", upsampler=True)
    recipe = recipe.replaced({"stage1.steps": "12", "stage1.video.cfg": "4"})

The presets are those of the released pipelines.
Source: `ltx_pipelines/{ti2vid_one_stage,ti2vid_two_stages,ti2vid_two_stages_hq,distilled}.py`,
`ltx_pipelines/utils/constants.py`.
"""

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from ltx2_jax.diffusion import schedules, steppers
from ltx2_jax.diffusion.guidance import Guidance
from ltx2_jax.diffusion.steppers import Stepper
from ltx2_jax.errors import UserError
from ltx2_jax.fields import replaced

RECIPES = ("one_stage", "two_stage", "distilled", "hq")
STEPPERS = ("euler", "ancestral", "res_2s", "gradient_estimation", "cfg_plus_plus")
TOKENS = 4096  # for which most pipelines shift the schedule, whatever the clip


@dataclass(frozen=True)
class Scales:
    """How one stream is guided; the defaults are no guidance. A scale is neutral at 1, stg at 0."""

    cfg: float = 1.0  # away from what the negative prompt gives
    stg: float = 0.0  # away from what is seen with self-attention skipped in stg_blocks
    rescale: float = 0.0  # 1: the guided estimate gets the deviation of the conditional one
    modality: float = 1.0  # away from what is seen without the other stream
    stg_blocks: tuple[int, ...] = ()
    skip_step: int = 0  # guided at every (skip_step + 1)th step, between them the last one holds

    @property
    def on(self) -> bool:
        return self.cfg != 1 or self.stg != 0 or self.modality != 1


@dataclass(frozen=True)
class Stage:
    """One run of the sampler, at a share of the final height and width.

    It starts from the latents of the stage before, with as much noise as its first sigma says.
    """

    size: float = 1.0
    schedule: str = "ltx2"  # a name of `schedules.SCHEDULES`, for `steps` steps
    steps: int = 30
    tokens: int | None = TOKENS  # that shift the schedule; None: those of the stage's latents
    sigmas: tuple[float, ...] = ()  # instead of schedule and steps
    stepper: str = "euler"
    eta: float = 1.0  # how much noise a stepper draws that draws any
    video: Scales = Scales()
    audio: Scales = Scales()
    # How passes are combined: other directions than the difference.
    how: Guidance = field(default_factory=Guidance)
    distilled_lora: float = 0.0  # strength of the distilled LoRA

    def __post_init__(self):
        if self.stepper not in STEPPERS:
            raise UserError(f"stepper={self.stepper!r}: choose from {', '.join(STEPPERS)}")
        if self.schedule not in schedules.SCHEDULES:
            raise UserError(
                f"schedule={self.schedule!r}: choose from {', '.join(schedules.SCHEDULES)}"
            )
        if self.steps < 1:
            raise UserError(f"steps={self.steps} must be at least 1")
        if self.size not in (0.5, 1.0):
            raise UserError(f"size={self.size}: 1 is the full size, 0.5 half of it")
        s = self.sigmas
        if s and not (len(s) > 1 and s[0] <= 1 and s[-1] == 0 and all(np.diff(s) < 0)):
            raise UserError(f"sigmas={s} do not fall from at most 1 to 0")

    @property
    def step(self) -> Stepper:
        kinds = {
            "euler": steppers.Euler(),
            "ancestral": steppers.AncestralEuler(eta=self.eta),
            "res_2s": steppers.Res2s(eta=self.eta),
            "gradient_estimation": steppers.GradientEstimation(),
            "cfg_plus_plus": steppers.EulerCFGPlusPlus(eta=self.eta),
        }
        return kinds[self.stepper]

    def sigma_values(self, tokens: int) -> np.ndarray:
        """float32 [steps + 1], for latents of so many video tokens."""
        if self.sigmas:
            return np.asarray(self.sigmas, np.float32)
        steps = 8 if self.schedule == "distilled" else self.steps
        return schedules.make_sigmas(self.schedule, steps, self.tokens or tokens)


@dataclass(frozen=True)
class Recipe:
    """Stages, each starting from the latents of the one before, upsampled."""

    name: str
    stages: tuple[Stage, ...]
    sound_of: int = -1  # the stage whose sound is kept
    image_crf: int = 33  # of the H.264 that images go through before they are given; 0: none
    distilled: bool = False  # made for weights that need no guidance

    def replaced(self, changes: Mapping[str, str]) -> "Recipe":
        """With fields changed: {"stage1.steps": "20", "image_crf": "0"}.

        Raises:
          UserError: naming a field or a stage that there is not, or a value of another type.
        """
        stages = list(self.stages)
        for number in range(len(stages)):
            prefix = f"stage{number + 1}."
            mine = {k.removeprefix(prefix): v for k, v in changes.items() if k.startswith(prefix)}
            if mine:
                stages[number] = replaced(stages[number], mine, f"--stage{number + 1}")
        known = {f.name for f in dataclasses.fields(self)} - {"name", "stages"}
        own = {name: text for name, text in changes.items() if name in known}
        for name in changes.keys() - own.keys():
            found = re.fullmatch(r"stage(\d+)\..+", name)
            if not found or not 1 <= int(found[1]) <= len(stages):
                have = ", ".join(f"stage{i + 1}" for i in range(len(stages)))
                raise UserError(f"--{name}: the recipe {self.name} has {have}, not that")
        return replaced(dataclasses.replace(self, stages=tuple(stages)), own, "--recipe")

    def described(self) -> str:
        """A few lines for a person."""
        lines = [f"recipe {self.name}:"]
        for number, stage in enumerate(self.stages):
            kept = ", its sound is kept" if number == self.sound_of % len(self.stages) else ""
            count = len(stage.sigmas) - 1 if stage.sigmas else stage.steps
            schedule = "sigmas " + " ".join(f"{s:g}" for s in stage.sigmas)
            schedule = schedule if stage.sigmas else f"schedule {stage.schedule}"
            guided = "; ".join(
                f"{name} cfg {g.cfg:g} stg {g.stg:g} rescale {g.rescale:g} modality {g.modality:g}"
                for name, g in (("video", stage.video), ("audio", stage.audio))
                if g.on
            )
            lora = f", distilled LoRA {stage.distilled_lora:g}" if stage.distilled_lora else ""
            lines.append(
                f"  stage {number + 1}: size x{stage.size:g}, {count} steps of {stage.stepper}, "
                f"{schedule}, {guided or 'no guidance'}{lora}{kept}"
            )
        return "\n".join(lines)


# --------------------------------------------------------------------------------------- presets

# By release: steps, the block whose self-attention guidance skips, CRF of images.
_BY_RELEASE = {"2.0": (40, 29, 33), "2.3": (30, 28, 33), "2.5": (30, 28, 18)}
_STAGE_2 = Stage(sigmas=schedules.STAGE_2_SIGMAS)


def one_stage(release: str, layers: int = 48) -> Recipe:
    """All steps at full size, with full guidance."""
    steps, block, crf = _of(release)
    block = min(block, layers - 1)
    shared = {"stg": 1.0, "rescale": 0.7, "modality": 3.0, "stg_blocks": (block,)}
    stage = Stage(steps=steps, video=Scales(cfg=3.0, **shared), audio=Scales(cfg=7.0, **shared))
    return Recipe("one_stage", (stage,), image_crf=crf)


def two_stage(release: str, layers: int = 48) -> Recipe:
    """Guided at half size, then three steps of the distilled LoRA at full size."""
    one = one_stage(release, layers)
    first = dataclasses.replace(one.stages[0], size=0.5)
    second = dataclasses.replace(_STAGE_2, distilled_lora=1.0)
    return dataclasses.replace(one, name="two_stage", stages=(first, second), sound_of=0)


def hq(release: str, layers: int = 48) -> Recipe:
    """Fewer steps of second order, with some of the distilled LoRA in both stages."""
    first = Stage(
        size=0.5,
        steps=15,
        tokens=None,
        stepper="res_2s",
        eta=0.5,
        video=Scales(cfg=3.0, rescale=0.45, modality=3.0),
        audio=Scales(cfg=7.0, rescale=1.0, modality=3.0),
        distilled_lora=0.25,
    )
    second = dataclasses.replace(_STAGE_2, stepper="res_2s", eta=0.5, distilled_lora=0.5)
    return Recipe("hq", (first, second), sound_of=0, image_crf=_of(release)[2])


def distilled(release: str, layers: int = 48, *, upsampler: bool = True) -> Recipe:
    """Eight steps without guidance, and with an upsampler three more at twice the size."""
    stepper = "ancestral" if release == "2.5" else "euler"
    first = Stage(
        size=0.5 if upsampler else 1.0, sigmas=schedules.DISTILLED_SIGMAS, stepper=stepper
    )
    stages = (first, _STAGE_2) if upsampler else (first,)
    return Recipe("distilled", stages, image_crf=_of(release)[2], distilled=True)


def choose(
    release: str,
    kind: str,
    *,
    upsampler: bool,
    distilled_lora: bool = False,
    layers: int = 48,
    name: str | None = None,
) -> Recipe:
    """The recipe of a model, or the one called `name`.

    Args:
      release: "2.0", "2.3" or "2.5".
      kind: "dev", or "distilled" weights.
      upsampler: whether there is a latent upsampler.
      distilled_lora: whether there is a distilled LoRA.
      layers: of the transformer.
      name: one of `RECIPES`; None chooses by what there is.

    Raises:
      UserError: no such recipe, or one that needs what is not there.
    """
    if name is None:
        name = "distilled" if kind == "distilled" else "one_stage"
        if kind != "distilled" and upsampler and distilled_lora:
            name = "two_stage"
    if name not in RECIPES:
        raise UserError(f"no recipe is called {name!r}: choose from {', '.join(RECIPES)}")
    if name in ("two_stage", "hq"):
        if not upsampler:
            raise UserError(
                f"recipe {name} needs a latent upsampler: --spatial-upsampler-path (upsampler=)"
            )
        if not distilled_lora and kind != "distilled":
            raise UserError(
                f"recipe {name} needs the distilled LoRA: --distilled-lora (distilled_lora=)"
            )
        return {"two_stage": two_stage, "hq": hq}[name](release, layers)
    if name == "distilled":
        return distilled(release, layers, upsampler=upsampler)
    return one_stage(release, layers)


def at_full_size(recipe: Recipe) -> Recipe:
    """The first stage alone, at the size of the clip: no small one comes before it."""
    first = dataclasses.replace(recipe.stages[0], size=1.0)
    return dataclasses.replace(recipe, stages=(first,), sound_of=-1)


def _of(release: str) -> tuple[int, int, int]:
    return _BY_RELEASE[release if release in _BY_RELEASE else "2.0"]
