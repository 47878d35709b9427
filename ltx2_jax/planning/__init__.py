"""What programs need on TPU slices that are not here, and how fast they run on this machine.

The one door: `BENCHES` are behind `python -m ltx2_jax.bench`, all else behind
`python -m ltx2_jax.plan`. FLOPs are counted in `ltx2_jax.models.flops`, rates of chips stand in
`ltx2_jax.chips`.

    compiled/   what a compiled program does, read from its text
    bench/      the parts of bench
"""

from ltx2_jax.planning.bench import BENCHES
from ltx2_jax.planning.clip import CLIPS, plan_clip
from ltx2_jax.planning.hosts import plan_hosts
from ltx2_jax.planning.programs import DEFAULT_SIZE, request_of
from ltx2_jax.planning.reports import describe
from ltx2_jax.planning.search import search_plans, search_samples
from ltx2_jax.planning.text import TEXT_ENCODERS, plan_text
from ltx2_jax.planning.transformer import plan_sample, plan_train
from ltx2_jax.planning.vae import VAES, plan_vae

__all__ = [
    "BENCHES",
    "CLIPS",
    "DEFAULT_SIZE",
    "TEXT_ENCODERS",
    "VAES",
    "describe",
    "plan_clip",
    "plan_hosts",
    "plan_sample",
    "plan_text",
    "plan_train",
    "plan_vae",
    "request_of",
    "search_plans",
    "search_samples",
]
