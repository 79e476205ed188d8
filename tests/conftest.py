"""What tests of all rooms share."""

import shutil
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.support.old_runs import OLD_RUN
from tests.support.peers import name_operators


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    """Other libraries can be imported beside torchvision, whichever test is the first."""
    if item.get_closest_marker("parity") and find_spec("torch") and find_spec("torchvision"):
        name_operators()


@pytest.fixture(scope="session")
def trained_run(_references, tmp_path_factory) -> Path:
    """The folder of one finished run of `tests.support.tiny_run.trained_config()`.

    It is there to be read: whoever changes it takes `copy_of_run`.
    """
    # The tests that take no run need not wait for what a training imports.
    from diffjax.loop import loop
    from tests.support.shared_parts import shared_parts
    from tests.support.tiny_run import COMMAND, once_a_session, trained_config

    def train(folder: Path) -> None:
        with pytest.MonkeyPatch.context() as patch:
            shared_parts(patch)
            loop.train(trained_config(), folder, command=COMMAND)

    return once_a_session(tmp_path_factory, "trained_run", train)


@pytest.fixture(scope="session")
def loaded_run(trained_run):
    """`trained_run` on one device, whose programs all tests of a worker share; to be read."""
    from tests.support.tiny_run import loaded, one_device

    return loaded(trained_run, mesh=one_device())


@pytest.fixture(scope="session")
def loaded_on_all(trained_run):
    """The same on all devices, as it was trained and evaluated."""
    from tests.support.tiny_run import loaded

    return loaded(trained_run)


@pytest.fixture(scope="session")
def old_run():
    """The run that an earlier version left, loaded once on one device; to be read."""
    import diffjax
    from tests.support.tiny_run import one_device

    return diffjax.load(OLD_RUN, mesh=one_device())


@pytest.fixture
def copy_of_run(trained_run, tmp_path) -> Path:
    """The same, to be changed."""
    return shutil.copytree(trained_run, tmp_path / "run")
