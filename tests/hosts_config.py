"""A run of several processes in seconds: the small one, or one with a step that compiles at once.

The argument is a list such as "drill;1,5,SIGTERM": with stand-ins for the step and the clips, and
process 1 gets a signal once step 5 is logged. What else may happen then is in `EVENTS`.
"""

import dataclasses
import functools
import os
import resource
import signal
import time

import jax
import jax.numpy as jnp
import numpy as np
import resume_config

from ltx2_jax import hosts
from ltx2_jax.config import Config
from ltx2_jax.errors import UserError
from ltx2_jax.sharding import make_mesh, pin
from ltx2_jax.training import loop, workdir
from ltx2_jax.training.metrics import MetricsLogger


def init_state(key, config):
    weight = pin(jax.random.normal(key, (16, 8)), "fsdp", None)
    return {"params": {"a": {"weight": weight}}, "ema": {}, "opt": {}, "step": jnp.int32(0)}


def make_train_step(config, strides, clock, *, donate=True):
    """Weights that follow the examples of all hosts and their order, as real ones would."""

    def step(state, batch, null_text):
        rows = jnp.mean(batch["video"].astype(jnp.float32), axis=(1, 2, 3, 4))
        value = jnp.mean(rows * jnp.arange(1, rows.shape[0] + 1)) + 1
        weight = state["params"]["a"]["weight"] * 0.9 + value * (state["step"] + 1)
        new = {"params": {"a": {"weight": weight}}, "step": state["step"] + 1}
        bad = jnp.where(new["step"] >= NAN_AT, jnp.nan, 1.0)
        return state | new, {"loss": value * bad, "grad_norm": weight.sum() * bad}

    return jax.jit(step, donate_argnums=0 if donate else ())


NAN_AT = 10**6


def interleaved(*sizes, **slices):
    """A mesh in which the devices of two hosts take turns."""
    devices = np.array(jax.devices()).reshape(2, -1).T.flatten()
    return make_mesh(*sizes, devices=list(devices), **slices)


def nan_from(step):
    global NAN_AT
    NAN_AT = step


def refuse():
    raise UserError("records/data-0: damaged record")


def fail():
    raise RuntimeError("a bug")


def full():
    """No file of this process can grow any more."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


def free():
    """They can again."""
    resource.setrlimit(resource.RLIMIT_FSIZE, resource.getrlimit(resource.RLIMIT_FSIZE)[1:] * 2)


def on_a_disk_of_its_own():
    """A relative workdir is another one in every process."""
    folder = f"disk-{hosts.index()}"
    os.makedirs(folder, exist_ok=True)
    os.chdir(folder)
    loop.opened = functools.partial(workdir.opened, seconds=1.0)


EVENTS = {"refuse": refuse, "fail": fail, "full": full, "free": free,
          "sleep": lambda: time.sleep(1000)}  # fmt: skip


def event_after(process, step, name):
    """What is called so happens to a process once a step is logged: always at the same moment."""
    log = MetricsLogger.log

    def logged(self, at, metrics):
        log(self, at, metrics)
        if (at, hosts.index()) == (step, process):
            if name in EVENTS:
                EVENTS[name]()
            else:
                os.kill(os.getpid(), signal.Signals[name])

    MetricsLogger.log = logged


def event_in(process, phase, name):
    """The same when it enters a phase; it goes on, for a while as if it were in a compiler."""
    progress = hosts.progress

    def noted(now, *given, **numbers):
        progress(now, *given, **numbers)
        if (now, hosts.index()) == (phase, process):
            hosts.progress = progress
            os.kill(os.getpid(), signal.Signals[name])
            time.sleep(2)

    hosts.progress = noted


def slowly():
    """Steps of a twentieth of a second."""
    log = MetricsLogger.log
    MetricsLogger.log = lambda self, *given: time.sleep(0.05) or log(self, *given)


def get_config(arg: str | None = None) -> Config:
    config = resume_config.get_config()
    for word in (arg or "").split(";"):
        if word == "drill":
            loop.init_state, loop.make_train_step = init_state, make_train_step
            loop.last_clips = lambda *_: None
        elif word == "unsampled":
            loop.last_clips = lambda *_: None
        elif word == "interleaved":
            loop.make_mesh = interleaved
        elif word == "slow":
            slowly()
        elif word == "apart":
            on_a_disk_of_its_own()
        elif word.startswith("nan"):
            nan_from(int(word[3:]))
        elif word:
            process, when, name = word.split(",")
            event = event_after if when.isdecimal() else event_in
            event(int(process), int(when) if when.isdecimal() else when, name)
    optim = dataclasses.replace(config.optim, ema_decay=None, max_bad_steps=2)
    return dataclasses.replace(config, optim=optim)
