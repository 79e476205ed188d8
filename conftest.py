"""Tests and docstring examples run on eight fake CPU devices, unless the caller chose otherwise."""

import gc
import os
import subprocess
import sys
import zlib
from pathlib import Path

import pytest
from jaxtyping import install_import_hook

import tests.support.shapes  # noqa: F401 the import hook looks it up

# JAX reads all of these when it is first imported, hence before anything of the project.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
_DEVICES = "--xla_force_host_platform_device_count"
if _DEVICES not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_DEVICES}=8".strip()

# Most of what is compiled here runs for milliseconds: code that is made quickly and runs slowly
# halves the tests' time. The runs of tests/processes/test_faults.py are compiled as a user's are.
_QUICK = (
    "--xla_backend_optimization_level=0",
    "--xla_cpu_use_fusion_emitters=false",
    "--xla_cpu_parallel_codegen_split_count=1",
)


def _known(*flags: str) -> bool:
    """Whether this XLA has the flags: it ends the process at one that it has not."""
    devices = "from jaxlib import xla_client; xla_client.make_cpu_client()"
    environment = {**os.environ, "XLA_FLAGS": " ".join(flags)}
    return not subprocess.run(
        [sys.executable, "-c", devices], env=environment, capture_output=True, check=False
    ).returncode


_new = [flag for flag in _QUICK if flag.partition("=")[0] not in os.environ["XLA_FLAGS"]]
if _new and not _known(*_new):
    _new = [flag for flag in _new if _known(flag)]
os.environ["XLA_FLAGS"] = " ".join([os.environ["XLA_FLAGS"], *_new])

# Nearly all of the tests' time is compilation: a second run of the networks' tests takes a quarter
# of the processor time, and a first run no more than without a cache.
_CACHE = Path(__file__).parent / ".pytest_cache" / "jax"
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(_CACHE))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")

# Ranks are broadcast by hand: JAX refuses to do it by itself.
os.environ.setdefault("JAX_NUMPY_RANK_PROMOTION", "raise")

# Modules whose signatures state shapes: these are checked at each call.
_ROOT = Path(__file__).parent
_SHAPED = [
    ".".join(file.relative_to(_ROOT).with_suffix("").parts)
    for file in _ROOT.glob("diffjax/**/*.py")
    if "jaxtyping" in (text := file.read_text("utf-8")) or "diffjax.shapes" in text
]
install_import_hook(_SHAPED, "tests.support.shapes.checked")

# What JAX keeps of traced programs is millions of objects, which are looked through seldom.
gc.set_threshold(200_000, 50, 1_000)


def pytest_collection_finish():
    """What was imported stays."""
    gc.collect()
    gc.freeze()


def pytest_addoption(parser):
    """`pytest -m faults --trials=200`: how many disturbed runs there are of each test of them."""
    parser.addoption(
        "--trials",
        type=int,
        default=1,
        help="disturbed runs, and tries of tests/experiments/test_fuzz.py",
    )
    parser.addoption("--base_seed", default="0", help="of what that file types")


# Examples of docstrings that extract features, initialise a large network, sample or evaluate a
# model, or compile for a second: they are `thorough`.
_LONG_EXAMPLES = {
    "diffjax/evaluation/extractors/features.py",
    "diffjax/evaluation/metrics.py",
    "diffjax/likelihood/bound.py",
    "diffjax/likelihood/dequantise.py",
    "diffjax/likelihood/ode.py",
    "diffjax/models/adm/network.py",
    "diffjax/models/autoencoder_kl/network.py",
    "diffjax/models/ddpm/network.py",
    "diffjax/models/ddt/network.py",
    "diffjax/models/dit/network.py",
    "diffjax/models/edm/network.py",
    "diffjax/models/edm2/network.py",
    "diffjax/models/flux/network.py",
    "diffjax/models/flux2/network.py",
    "diffjax/models/jit/network.py",
    "diffjax/models/kandinsky/network.py",
    "diffjax/models/lightningdit/network.py",
    "diffjax/models/lpips/network.py",
    "diffjax/models/movq/network.py",
    "diffjax/models/sd3/network.py",
    "diffjax/models/layers/blockwise.py",
    "diffjax/models/layers/seamless.py",
    "diffjax/models/sit/network.py",
    "diffjax/models/stable_diffusion/network.py",
    "diffjax/models/unet.py",
    "diffjax/models/uvit/network.py",
    "diffjax/optimizers/mup.py",
    "diffjax/oracle/analytic.py",
    "diffjax/oracle/verify.py",
    "diffjax/sampling/parallel.py",
    "diffjax/studies/convergence.py",
    "diffjax/studies/legality.py",
    "diffjax/studies/validation.py",
}


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """A fixed tenth of the cases of each `thorough` test is in every run of the tests.

    Which one depends on its file and name alone. Long examples of docstrings are never in it,
    nor are cases of `pytest.mark.thorough(tenth=False)`: a default test is their witness.
    """
    for item in items:
        if item.nodeid.partition("::")[0] in _LONG_EXAMPLES:
            item.add_marker("thorough")
        elif "callspec" in vars(item) and zlib.crc32(item.nodeid.encode()) % 10 == 0:
            item.own_markers = [
                mark
                for mark in item.own_markers
                if mark.name != "thorough" or mark.kwargs.get("tenth") is False
            ]


@pytest.fixture(autouse=True, scope="session")
def _references(tmp_path_factory):
    """What is stored of data sets is not taken from, nor left to, whoever runs the tests."""
    with pytest.MonkeyPatch.context() as patch:
        folder = str(tmp_path_factory.mktemp("references"))
        patch.setattr("diffjax.evaluation.cached_arrays.FOLDER", folder)
        yield
