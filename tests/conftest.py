"""What tests of all rooms share."""

import shutil
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def trained_run(_references, tmp_path_factory) -> Path:
    """The folder of one finished run of `tests.support.tiny_run.trained_config()`.

    It is there to be read: whoever changes it takes `copy_of_run`.
    """
    # The tests that take no run need not wait for what a training imports.
    from diffjax.loop import loop
    from tests.support.tiny_run import COMMAND, once_a_session, trained_config

    def train(folder: Path) -> None:
        loop.train(trained_config(), folder, command=COMMAND)

    return once_a_session(tmp_path_factory, "trained_run", train)


@pytest.fixture
def copy_of_run(trained_run, tmp_path) -> Path:
    """The same, to be changed."""
    return shutil.copytree(trained_run, tmp_path / "run")
