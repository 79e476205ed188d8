"""One tiny run of the digits config, trained by `experiments.train`, for all that only need one."""

import shutil

import pytest

import diffjax
from experiments import train
from experiments.flags import cli
from tests.support.tiny_run import on_one_device, once_a_session, one_device
from tests.support.whole_checkpoints import whole_checkpoints

CONFIG = """
from configs import digits
from diffjax import choices
from diffjax.evaluation.extractors.features import pixel_features
from diffjax.spec import spec

def get_config(arguments=""):
    config = digits.get_config(arguments)
    config.num_steps, config.batch_size, config.log_every_steps = 4, 16, 2
    config.model.update(hidden_size=16, depth=1)
    # Far enough from its first weights that solvers differ after four steps.
    config.optimizer.update(learning_rate=0.03, warmup_steps=1)
    config.sampling.update(solver=choices.copy(choices.SOLVERS["euler"]), num_steps=2)
    config.evaluation.update(num_samples=20, batch_size=24, solvers=(), num_steps=())
    config.evaluation.likelihood = ("vlb",)
    config.evaluation.extractors = (spec(pixel_features, size=2),)
    return config
"""


@pytest.fixture(scope="session")
def config_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("config") / "tiny.py"
    path.write_text(CONFIG)
    return path


@pytest.fixture(scope="session")
def trained(config_file, tmp_path_factory):
    """The folder of the run, which is for reading alone."""

    def by_hand(folder):
        argv = [f"--config={config_file}", f"--workdir={folder}"]
        with whole_checkpoints(), pytest.MonkeyPatch.context() as patch:
            on_one_device(patch)
            assert cli.run(train.main, train.FLAGS, usage=train.USAGE, argv=argv) == 0

    return once_a_session(tmp_path_factory, "digits", by_hand)


@pytest.fixture
def workdir(trained, tmp_path):
    """A copy of the run's folder, to do something with."""
    return shutil.copytree(trained, tmp_path / "digits")


@pytest.fixture(scope="session")
def loaded(trained):
    return diffjax.load(trained, mesh=one_device())


@pytest.fixture
def loaded_once(trained, loaded, monkeypatch):
    """The folder of the run, read once for all programs: for errors that come after it was read."""

    def load(workdir, **how):
        del how
        assert workdir == str(trained)
        return loaded

    monkeypatch.setattr(diffjax, "load", load)
    return trained
