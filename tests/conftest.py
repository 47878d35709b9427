"""One CPU process with 8 devices for all tests; golden data from the repository or --golden-dir."""

import atexit
import gc
import hashlib
import os
import platform
import shutil
import signal
import tempfile
from importlib.metadata import version
from pathlib import Path

import pytest

PROGRAMS_BYTES = 2**31  # of compiled programs that are kept: beyond, all of them go

os.environ["JAX_PLATFORMS"] = "cpu"
# Optimising the programs takes longer than running them once on tiny arrays.
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
    " --xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
    " --xla_cpu_parallel_codegen_split_count=1"  # each part is work of its own; workers share cores
)
if version("jaxlib") < "0.11":  # its newer code generator takes twice as long; later ones are quick
    os.environ["XLA_FLAGS"] += " --xla_cpu_use_fusion_emitters=false"


def _programs() -> Path:
    """The folder of this user and this kind of CPU in which compiled programs are kept.

    One for this run alone, if that cannot be written.
    """
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    cpu = platform.machine() + next((x for x in lines if x.startswith(("flags", "Features"))), "")
    caches = Path(os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser())
    folder = caches / "ltx2_jax-tests" / hashlib.sha256(cpu.encode()).hexdigest()[:12]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError:
        folder = Path(tempfile.mkdtemp(prefix="ltx2_jax-tests-"))
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
    kept = {file: file.stat().st_size for file in folder.iterdir()}
    if sum(kept.values()) > PROGRAMS_BYTES:
        for file in kept:
            file.unlink(missing_ok=True)
    return folder


# Workers, the commands that tests start, and later runs compile the same programs: once is enough.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(_programs())
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")

UNFREEZE = gc.unfreeze


def pytest_addoption(parser):
    parser.addoption(
        "--golden-dir",
        type=Path,
        default=Path(__file__).parent / "golden",
        help="folder of golden data: one sub-folder with a cases.json per model release",
    )
    parser.addoption(
        "--golden-training-dir",
        type=Path,
        default=Path(__file__).parent / "golden_training",
        help="folder of golden training data: one set with a cases.json",
    )


# Longest first: workers take whole files, and what is begun last should be short.
LONG = (
    "test_golden.py", "test_hosts.py", "test_resume.py", "test_plan_transformer.py",
    "test_tasks.py", "test_release.py", "test_sharding.py", "test_quantized_sampling.py",
    "test_golden_training.py", "test_bench.py", "test_lora_training.py",
    "test_quantized_training.py", "test_convert.py", "test_mixed.py", "test_release_25.py",
    "test_validation.py", "test_training.py", "test_cli.py", "test_loop_claims.py",
    "test_generate.py", "test_notebook.py", "test_attention.py", "test_launch.py",
    "test_loading.py", "test_codec.py", "test_sampling_given.py", "test_transformer.py",
)  # fmt: skip


def pytest_configure(config):
    # What tracing makes is kept in caches: to look through it every 700 objects is in vain, and so
    # it is before and after the loop of every training. It stays frozen: see `modules_are_apart`.
    gc.set_threshold(50_000, 20, 50)
    gc.unfreeze = lambda: None
    if hasattr(config.option, "loadscopereorder"):  # of pytest-xdist, which would put it last
        config.option.loadscopereorder = False


def pytest_collection_modifyitems(items):
    order = {name: place for place, name in enumerate(LONG)}
    items.sort(key=lambda item: order.get(item.path.name, len(LONG)))


def pytest_generate_tests(metafunc):
    if "golden_case" in metafunc.fixturenames:
        from golden_case import load_cases

        cases = load_cases(metafunc.config.getoption("--golden-dir"))
        metafunc.parametrize("golden_case", cases, ids=[f"{c.folder.name}/{c.name}" for c in cases])
    if "golden_training_case" in metafunc.fixturenames:
        from golden_case import load_set

        cases = load_set(
            metafunc.config.getoption("--golden-training-dir"),
            metafunc.config.getoption("--golden-dir"),
        )
        metafunc.parametrize("golden_training_case", cases, ids=[c.id for c in cases])


@pytest.fixture(autouse=True, scope="module")
def modules_are_apart():
    """The garbage of a module goes, and what is left after it is not looked through again.

    Compiled programs go before they are too many: a worker stays below 6 GiB then, and far from the
    65,530 pieces of memory that Linux maps at most.
    """
    yield
    maps = Path("/proc/self/maps")
    if maps.exists() and len(maps.read_bytes().splitlines()) > 12_000:
        import jax

        jax.clear_caches()
        UNFREEZE()
    gc.collect()
    gc.freeze()


@pytest.fixture
def usual_signals():
    """Handlers as in a terminal; a process in the background may have been told to ignore some."""
    usual = {signal.SIGINT: signal.default_int_handler} | dict.fromkeys(
        (signal.SIGTERM, signal.SIGHUP), signal.SIG_DFL
    )
    before = {number: signal.signal(number, handler) for number, handler in usual.items()}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def mesh_context():
    """`with mesh_context(data, model, sequence):` runs under an explicit mesh of fake devices."""
    import jax

    from ltx2_jax.sharding import make_mesh

    def enter(data, model, sequence):
        count = data * model * sequence
        return jax.set_mesh(make_mesh(data, model, sequence, devices=jax.devices()[:count]))

    return enter
