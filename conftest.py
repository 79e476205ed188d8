"""Tests and docstring examples run on eight fake CPU devices, unless the caller chose otherwise."""

import os
from pathlib import Path

import pytest

# JAX reads all of these when it is first imported, hence before anything of the project.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
_DEVICES = "--xla_force_host_platform_device_count"
if _DEVICES not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_DEVICES}=8".strip()

# Nearly all of the tests' time is compilation: a second run of the networks' tests takes a quarter
# of the processor time, and a first run no more than without a cache.
_CACHE = Path(__file__).parent / ".pytest_cache" / "jax"
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(_CACHE))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")


def pytest_addoption(parser):
    """`pytest -m faults --trials=200`: how many disturbed runs there are of each test of them."""
    parser.addoption(
        "--trials", type=int, default=1, help="disturbed runs, and tries of tests/test_fuzz.py"
    )


@pytest.fixture(autouse=True, scope="session")
def _references(tmp_path_factory):
    """What is stored of data sets is not taken from, nor left to, whoever runs the tests."""
    with pytest.MonkeyPatch.context() as patch:
        folder = str(tmp_path_factory.mktemp("references"))
        patch.setattr("diffjax.evaluation.stored.FOLDER", folder)
        yield
