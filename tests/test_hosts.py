"""Which rows of a batch a host holds, and how several start, agree, stop, fail and end."""

import dataclasses
import inspect
import itertools
import json
import re
import signal
import socket
import subprocess
import sys
import time
from types import SimpleNamespace

import hosts_config
import jax
import numpy as np
import pytest
import resume_config
from pod import TESTS, environment, free_port, pod

from ltx2_jax import hosts
from ltx2_jax.config import load
from ltx2_jax.errors import UserError
from ltx2_jax.hosts import agreement, ending, rows_of_host
from ltx2_jax.sharding import make_mesh, sharding_of
from ltx2_jax.training import loop
from ltx2_jax.training.metrics import read_metrics


class Device:
    def __init__(self, process_index):
        self.process_index = process_index


def sharding(*devices):
    """Of devices (process, (first, end) of the rows)."""
    spans = {Device(process): (slice(*span),) for process, span in devices}
    return SimpleNamespace(devices_indices_map=lambda shape: spans)


def test_rows_may_lie_apart():
    interleaved = sharding((0, (0, 1)), (1, (1, 2)), (0, (2, 3)), (1, (3, 4)))
    assert rows_of_host(interleaved, 4, 0) == (0, 2)
    assert rows_of_host(interleaved, 4, 1) == (1, 3)


def test_hosts_that_share_a_shard_hold_the_same_rows():
    shared = sharding((0, (0, 2)), (0, (2, 4)), (1, (2, 4)), (1, (0, 2)))
    assert rows_of_host(shared, 4, 0) == rows_of_host(shared, 4, 1) == (0, 1, 2, 3)
    assert rows_of_host(sharding((0, (None,)), (1, (None,))), 4, 1) == (0, 1, 2, 3)


@pytest.mark.parametrize("mesh", [(8, 1, 1), (2, 2, 2), (1, 1, 8)])
def test_one_host_holds_the_whole_batch_whatever_the_mesh(mesh):
    assert rows_of_host(sharding_of(make_mesh(*mesh), "batch"), 8) == tuple(range(8))
    assert rows_of_host(sharding_of(make_mesh(devices=jax.devices()[:1]), "batch"), 2) == (0, 1)


# ------------------------------------------------------------------------------- several processes


def test_the_private_names_of_jax_that_we_need_are_there():
    from jax._src import clusters, compilation_cache, compiler, distributed

    client = distributed._jax.DistributedRuntimeClient
    for method in (
        "key_value_set", "blocking_key_value_get", "key_value_try_get", "key_value_dir_get",
        "key_value_delete",
    ):  # fmt: skip
        assert callable(getattr(client, method))
    state = distributed.global_state
    assert (state.client, state.process_id, state.num_processes) == (None, 0, 1)
    known = {kind.name for kind in clusters.ClusterEnv._cluster_types}
    assert known >= set(hosts.DETECTORS)
    assert callable(clusters.ClusterEnv.auto_detect_unset_distributed_params)
    assert list(inspect.signature(compiler._cache_write).parameters)[:5] == [
        "cache_key", "compile_time_secs", "module_name", "backend", "executable",
    ]  # fmt: skip
    assert list(inspect.signature(compilation_cache.put_executable_and_time).parameters)[:5] == [
        "cache_key", "module_name", "executable", "backend", "compile_time",
    ]  # fmt: skip
    assert "jax_enable_preemption_service" in jax.config.values


def test_one_process_agrees_with_itself_and_asks_nobody():
    assert hosts.gather("a") == ["a"]
    assert hosts.broadcast("b") == "b"
    assert hosts.agree(lambda: 3) == 3
    hosts.start()
    assert (hosts.index(), hosts.count()) == (0, 1)
    with pytest.raises(UserError, match=r"^no$"):
        hosts.agree(lambda: (_ for _ in ()).throw(UserError("no")))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("127.0.0.1:9", None, 1), "--num-processes: missing; all three or none"),
        ((None, 2, None), "--coordinator and --process-id: missing"),
        (("127.0.0.1:9", 2, 2), "--process-id=2: with --num-processes=2 it is from 0 to 1"),
        (("127.0.0.1", 2, 1), "--coordinator=127.0.0.1: expected HOST:PORT"),
        (("127.0.0.1:http", 2, 1), "--coordinator=127.0.0.1:http: expected HOST:PORT"),
    ],
)
def test_flags_that_do_not_fit_are_named(flags, message):
    with pytest.raises(UserError, match=re.escape(message)):
        hosts.start(*flags)


def test_a_coordinator_that_is_not_there_is_named():
    address = f"127.0.0.1:{free_port()}"
    with pytest.raises(hosts.LostError, match=f"{address}: nobody answers there in 1 s"):
        hosts.start(address, 2, 1, seconds=1)


@pytest.fixture
def told(monkeypatch):
    """`told(count, *processes)`: of so many hosts, what these have told the first, which is here.

    A dict stands for the service, whose lists are in the order of their keys' letters.
    """

    def tell(count, *processes):
        keys = {f"ltx2_jax/here/{p}": json.dumps(f"from {p}") for p in processes}
        service = SimpleNamespace(
            key_value_set=keys.__setitem__,
            key_value_delete=keys.pop,
            key_value_dir_get=lambda place: sorted(
                pair for pair in keys.items() if pair[0].startswith(place)
            ),
        )
        monkeypatch.setattr(agreement, "client", lambda: service)
        monkeypatch.setattr(agreement, "count", lambda: count)
        return keys

    return tell


def test_what_many_hosts_give_comes_in_their_order_and_all_get_it(told):
    keys = told(12, *range(1, 12))
    given = agreement.exchange("here", "from 0", seconds=0)
    assert given == [f"from {process}" for process in range(12)]
    assert json.loads(keys["ltx2_jax/all/here"]) == given


def test_what_all_hosts_have_read_is_removed(told, monkeypatch):
    """The service holds it in memory, for as long as a run lasts."""
    monkeypatch.setattr(agreement, "_calls", itertools.count())
    keys = told(2)
    for call in range(5):
        keys[f"ltx2_jax/gather/{call}/1"] = json.dumps("b")
        assert hosts.gather("a") == ["a", "b"]
    left = [f"ltx2_jax/{name}" for k in (3, 4) for name in (f"all/gather/{k}", f"gather/{k}/0")]
    assert sorted(key for key in keys if not key.endswith("/1")) == sorted(left)


@pytest.mark.parametrize(
    ("refusals", "message"),
    [
        (["a", "a"], "a"),
        (["", "a", "", "b"], "host-1: a (and 1 more host)"),
        (["", "a", "a", "b"], "host-1: a (and 2 more hosts)"),
    ],
)
def test_what_several_hosts_refuse_is_told_once(monkeypatch, refusals, message):
    monkeypatch.setattr(agreement, "gather", lambda *_: refusals)
    with pytest.raises(hosts.AgreedError, match=f"^{re.escape(message)}$"):
        hosts.agree(lambda: None)


def test_hosts_that_do_not_come_are_named(told):
    told(8, 1, 3)
    late = "host-2, host-4, host-5, host-6 and 1 more did not come in 0 s; the same command resumes"
    with pytest.raises(hosts.LostError, match=f"^save: {late}$"):
        agreement.exchange("here", "from 0", seconds=0, waiting="save")


def test_the_host_that_waits_most_for_its_data_is_known(monkeypatch):
    monkeypatch.setattr(ending, "_progress", ending._Progress())
    hosts.progress("data", 1, data_wait=0.5)
    hosts.progress("step", 1)
    assert ending._progress.numbers == {"data_wait": 0.5}  # still told
    waits = [{}, {"data_wait": 0.1}, {"data_wait": 0.5}, {"data_wait": 0.2}]
    monkeypatch.setattr(ending, "_of_all", {p: {"numbers": n} for p, n in enumerate(waits)})
    assert hosts.slowest("data_wait") == (2, 0.5)
    assert hosts.slowest("another") is None


def test_of_several_lost_hosts_the_one_that_is_silent_for_longest_is_named(monkeypatch):
    rows = {process: {"phase": "data", "step": process} for process in range(4)}
    monkeypatch.setattr(ending, "_of_all", rows)
    now, watch = time.monotonic(), ending.Watch(60)
    watch._beats = {p: (1, now - age) for p, age in enumerate((500, 90, 200, 0))}
    found = r"host-2 \(and 1 more\): lost in \"data\" of step 2, 200 s ago; the others wait in"
    assert re.match(found, watch.lost(60))
    assert watch.lost(300) == ""


def test_importing_the_commands_touches_no_device():
    code = (
        "from ltx2_jax import train, sample, prepare; from jax._src import xla_bridge; "
        "assert not xla_bridge.backends_are_initialized()"
    )
    assert subprocess.run([sys.executable, "-c", code], env=environment(1)).returncode == 0


def drill(folder, *what, processes=2, devices=1):
    return pod(folder, processes, devices, str(TESTS / "hosts_drill.py"), *map(str, what))


def test_a_host_too_few_is_told_and_to_be_started_again(tmp_path):
    port, flags = free_port(), ["--num-processes=2", "--process-id=0", "--start-timeout=1"]
    command = [sys.executable, TESTS / "hosts_drill.py", "talk", f"--coordinator=127.0.0.1:{port}"]
    done = subprocess.run([*command, *flags], env=environment(1), capture_output=True, text=True)
    assert done.returncode == 42
    (line,) = done.stderr.splitlines()
    assert re.match(rf"host-0 \(.*\): not all 2 processes came to 127\.0\.0\.1:{port} in 1 s", line)


@pytest.mark.parametrize(
    ("what", "codes", "message"),
    [
        (
            "stuck",
            [42, 42],
            r"stuck in \"data\" of step 7 for .*; others wait in \"step\" of step 7",
        ),
        (
            "stopped",
            [42, -signal.SIGKILL],
            r"lost in \"data\" of step 3, .*; the others wait in \"s",
        ),
    ],
)
def test_the_host_that_is_behind_is_named_and_all_show_what_they_do(tmp_path, what, codes, message):
    ended = drill(tmp_path, what, "--heartbeat=3")
    assert ended.codes == codes
    first, *stacks = ended.lines()
    assert re.match(rf"drill: error: host-1 \(.*\): {message}", first)
    assert any(f"in {what}" in line for line in stacks)


@pytest.fixture(scope="module")
def talked(tmp_path_factory):
    """Two hosts talk; then one of them gets a signal."""
    return drill(tmp_path_factory.mktemp("talk"), "talk")


def test_a_signal_to_one_host_ends_those_that_wait_for_it(talked):
    assert talked.codes == [143, 143]
    assert talked.lines() == ["drill: interrupted"]


def test_hosts_agree_or_refuse_together(talked):
    name = rf"host-1 \({re.escape(socket.gethostname())}\)"
    for me, output in enumerate(talked.out):
        lines = output.splitlines()
        assert lines[:4] == [
            f"{me} of 2", "['from 0', 'from 1']", "from 0", f"went on with {me}",
        ]  # fmt: skip
        assert lines[4] == "no dataset here"
        assert re.fullmatch(rf"{name}: no disk", lines[5])
        assert lines[6] == "the same"
        assert re.fullmatch(rf"{name}: rate is 1e-4, but 1e-3 on host-0 \(.*\)", lines[7])
        assert re.fullmatch(rf"{name}: extra is yes, but None on host-0 \(.*\)", lines[8])
        assert lines[9:] == (["said once"] if me == 0 else [])


# ------------------------------------------------------------------------------- train


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    """A small dataset, prepared once."""
    folder = tmp_path_factory.mktemp("data")
    config = dataclasses.replace(resume_config.get_config(), workdir=str(folder))
    return loop.dataset(config).folder


@pytest.fixture
def trained(tmp_path, records):
    """`trained(processes, devices, what, own=..., **fields)` runs train with `hosts_config`."""

    def run(processes, devices, what, *flags, own=None, **fields):
        given = {"workdir": tmp_path / "run", "data.path": records, "num_steps": 30} | fields
        flags = [*flags, *(f"--config.{name}={value}" for name, value in given.items())]
        config = f"--config={TESTS / 'hosts_config.py'}:drill;{what}"
        command = "-m", "ltx2_jax.train", config, *flags
        return pod(tmp_path / "logs", processes, devices, *command, own=own)

    run.workdir = tmp_path / "run"
    return run


def losses(workdir):
    return [row["loss"] for row in read_metrics(workdir)]


def on_one_process(workdir, records, monkeypatch, devices, steps):
    """The losses of the same run in this process."""
    monkeypatch.setattr(loop, "init_state", hosts_config.init_state)
    monkeypatch.setattr(loop, "make_train_step", hosts_config.make_train_step)
    changes = {"workdir": workdir, "num_steps": steps, "data.path": records}
    config = load(str(TESTS / "hosts_config.py"), {k: str(v) for k, v in changes.items()})
    mesh = make_mesh(devices=jax.devices()[:devices])
    monkeypatch.setattr(loop, "make_mesh", lambda *_, **__: mesh)
    loop.train(config, make_clips=lambda *_: None)
    return losses(workdir)


def test_stopped_on_any_host_all_save_one_step_and_another_layout_goes_on(
    trained, records, monkeypatch, tmp_path
):
    reference = on_one_process(tmp_path / "one", records, monkeypatch, 4, 20)
    ended = trained(2, 2, "slow;1,5,SIGTERM;interleaved", num_steps=20)
    assert ended.codes == [143, 143], ended.err
    step = int(re.search(r"stopped and saved at step (\d+); the same", ended.out[0])[1])
    assert 5 <= step <= 8
    np.testing.assert_allclose(losses(trained.workdir), reference[:step], rtol=2e-6)
    assert not ended.lines(1)
    resumed = on_one_process(trained.workdir, records, monkeypatch, 8, 20)
    np.testing.assert_allclose(resumed, reference, rtol=2e-6)


def log(workdir, process):
    return (workdir / "logs" / f"host-{process:02d}.log").read_text().splitlines()


@pytest.mark.parametrize(
    ("processes", "devices", "names"),
    [
        # In the order of the devices hosts share no rows where model is inside of a host.
        (2, 2, ("usual,2,2,1", "usual,1,2,2", "interleaved,2,2,1", "interleaved,2,1,2")),
        (4, 1, ("usual,2,1,1,2", "usual,1,2,1,2")),
    ],
    ids=["2x2: hosts share rows", "4x1: two slices"],
)
def test_on_any_mesh_of_several_hosts_the_losses_are_those_of_one_process(
    processes, devices, names, records, monkeypatch, tmp_path
):
    layout = {"processes": processes, "devices": devices}
    ended = drill(tmp_path / "logs", "meshes", records, tmp_path, *names, **layout)
    assert ended.codes == [0] * processes, ended.err
    reference = on_one_process(tmp_path / "one", records, monkeypatch, 1, 6)
    for name in names:
        np.testing.assert_allclose(losses(tmp_path / name), reference, rtol=2e-6, err_msg=name)


ONE = r"host-1 \(.*\): "


@pytest.mark.parametrize(
    ("what", "own", "code", "message"),
    [
        ("", {1: ["--config.optim.learning_rate=9"]}, 2,
         ONE + r"config\.optim\.learning_rate is 9\.0, but 0\.001 on host-0 \(.*\)"),
        ("1,3,refuse", {}, 2, ONE + "records/data-0: damaged record"),
        ("nan6", {}, 3, "loss is nan at step 7: lower optim.learning_rate .*"),
    ],
)  # fmt: skip
def test_what_goes_wrong_on_one_host_ends_all_in_one_line(trained, what, own, code, message):
    ended = trained(2, 1, what, own=own)
    assert ended.codes == [code, code], ended.err
    assert ended.seconds < 10
    (line,) = ended.lines()
    assert re.fullmatch(f"train: error: {message}", line)
    assert not ended.lines(1)
    if what == "1,3,refuse":  # the file of that host says where, process 0 only what
        noted = log(trained.workdir, 1)
        assert re.match(r"\S+ \S+ UTC  start, host-1 \(.*\) of 2, process \d+$", noted[0])
        assert "Traceback (most recent call last):" in "".join(noted)
        assert 'UTC  "compile"' in "".join(noted)
        assert re.search(
            rf'UTC  ends with 2 in "\w+" of step \d: train: error: {message}', noted[-1]
        )
        told = noted[-1].partition(": ")[2]
        assert any(line.endswith(told) for line in log(trained.workdir, 0))


def test_a_host_that_is_killed_is_named_and_the_others_end(trained):
    ended = trained(2, 1, "slow;1,5,SIGKILL", "--heartbeat=4")
    assert ended.codes == [42, -signal.SIGKILL]
    assert ended.seconds < 20
    line = ended.lines()[0]
    assert re.search(r"host-1 \(.*\): lost in .* of step \d+, .*; the same command resumes", line)
    assert line in "\n".join(log(trained.workdir, 0))


def test_disks_of_their_own_are_refused_before_the_first_step(trained, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ended = trained(2, 1, "apart", workdir="run")
    assert ended.codes == [2, 2], ended.err
    (line,) = ended.lines()
    assert re.search(ONE + "run: is not shared: this host does not see what host 0 wrote", line)
    assert not list(tmp_path.rglob("metrics.jsonl"))


def test_a_save_that_fails_on_one_host_is_told_at_once_and_holds_nobody_up(trained):
    ended = trained(
        2, 1, "slow;1,45,full;1,60,free", num_steps=105, **{"checkpoint.every_steps": 50}
    )
    assert ended.codes == [0, 0], ended.err
    told, decided = (line for line in ended.out[0].splitlines() if "checkpoint 50" in line)
    assert re.fullmatch(ONE + r"checkpoint 50 cannot be written \(.+\)", told)
    assert "checkpoint 50 cannot be written (host 1: " in decided
    noted = "\n".join(log(trained.workdir, 0))
    assert noted.index(told) < noted.index('"save" of step 100') < noted.index(decided)
    assert {path.name for path in (trained.workdir / "checkpoints").iterdir()} == {"100", "105"}
