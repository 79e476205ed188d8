"""Nothing is padded to a batch that nobody wanted: few samples cost few evaluations."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import diffjax
from diffjax.data import digits
from diffjax.evaluation.evaluate import NamedRecipe
from diffjax.evaluation.extractors.features import Extractor, pixel_features
from diffjax.evaluation.image_statistics import Batches, collect
from diffjax.process import paths, targets
from diffjax.process.paths import Pair
from diffjax.runs.measuring import measure
from diffjax.runs.measuring.evaluated_samples import WantedSamples
from diffjax.runs.measuring.measure import Wanted, drawer
from diffjax.sampling import solvers
from diffjax.studies.validation import loss_by_log_snr
from experiments import evaluate
from experiments.flags import cli
from tests.support.old_runs import OLD_RUN


@pytest.fixture(scope="module")
def loaded():
    """On all devices."""
    return diffjax.load(OLD_RUN)


def with_settings(run, **changes):
    config = run.config.copy_and_resolve_references()
    with config.unlocked():
        config.evaluation.update(changes)
    return replace(run, parts=replace(run.parts, config=config))


@pytest.fixture
def watched(loaded, tmp_path):
    """The run, evaluated by 500 as by default, and how many images its network sees at a time.

    The network is one that compiles quickly.
    """
    seen = []

    def apply(params, x, *how, **named):
        seen.append(len(x))
        return jnp.tanh(x)

    wired = loaded.parts.wired._replace(apply=apply)
    run = with_settings(loaded, batch_size=500)
    return replace(run, workdir=tmp_path, parts=replace(run.parts, wired=wired)), seen


@pytest.mark.parametrize(
    ("num_samples", "batch_size", "at_once"),
    [(16, None, 16), (16, 8, 8), (24, 500, 24), (3, None, 8)],  # eight devices divide a batch
)
def test_a_batch_of_an_evaluation_is_no_larger_than_its_samples(
    watched, num_samples, batch_size, at_once
):
    run, seen = watched
    assert jax.device_count() == 8
    one = replace(run.recipe, solver=solvers.euler(), num_steps=1, guidance_scale=1.0)
    named = NamedRecipe("euler", "uniform", one)
    labels = np.arange(num_samples) % 10
    batches = []
    draw = drawer(run, [named], WantedSamples(labels, labels, None), batches.append, batch_size)
    drawn, _ = draw(named)
    assert isinstance(drawn, Batches)
    images = np.concatenate(list(drawn.batches))
    assert len(images) == num_samples
    assert set(seen) == {at_once}
    assert len(batches) == -(-num_samples // at_once)


@pytest.mark.thorough(tenth=False)
def test_the_flag_says_how_many_at_a_time_and_the_likelihood_is_of_as_many_images(
    loaded, monkeypatch, tmp_path
):
    """Which were those of the config, whatever `--num_samples` was."""
    wanted, found = [], {}
    monkeypatch.setattr(evaluate, "measure", lambda run, data, how, **_: wanted.append(how))
    flags = (f"--workdir={OLD_RUN}", "--num_samples=16", "--batch_size=4")
    monkeypatch.setattr(evaluate, "make_writable", lambda workdir: None)
    monkeypatch.setattr(evaluate, "is_first", lambda: False)
    assert cli.run(evaluate.main, evaluate.FLAGS, usage=evaluate.USAGE, argv=flags) == 0
    assert (wanted[0].num_samples, wanted[0].batch_size) == (16, 4)
    assert cli.run(evaluate.main, evaluate.FLAGS, usage="", argv=(*flags, "--batch_size=0")) == 2

    class Enough(Exception):
        pass

    def likelihood(run, dataset, bits, begun):
        found.update(vars(bits))
        raise Enough

    run = replace(with_settings(loaded, likelihood=("vlb",)), workdir=tmp_path)
    wired = run.parts.wired
    one = replace(wired.recipe, solver=solvers.euler(), num_steps=1, guidance_scale=1.0)
    run = replace(run, parts=replace(run.parts, wired=wired._replace(recipe=one)))
    monkeypatch.setattr(measure, "measure_likelihood", likelihood)
    few = {"solvers": (), "num_steps": (), "batch_size": 8}
    how = replace(wanted[0], **few, extractors=[pixel_features(size=2)])
    with pytest.raises(Enough):
        measure.measure(run, digits(), how)
    assert (found["num_images"], found["batch_size"]) == (16, 8)
    assert Wanted().batch_size is None


@pytest.mark.parametrize(
    ("batches", "sizes"),
    [([5], [8]), ([30], [32]), ([256], [256]), ([300], [256, 256]), ([16, 16, 3], [16, 16, 16])],
)
def test_an_extractor_sees_few_images_as_a_small_batch(batches, sizes):
    """Of Inception on a CPU, 226 images more than the 30 that were wanted are two minutes."""
    shown = []

    def apply(images):
        shown.append(len(images))
        return jnp.reshape(images, (len(images), -1)), None

    extractor = Extractor("recorded", "0" * 64, None, apply)
    images = np.random.default_rng(0).uniform(-1, 1, (sum(batches), 2, 2, 1)).astype(np.float32)
    parts = np.split(images, np.cumsum(batches)[:-1])
    found = collect(Batches(len(images), parts), extractor)
    np.testing.assert_array_equal(found.features, images.reshape(len(images), -1))
    assert shown == sizes


@pytest.mark.thorough(tenth=False)
def test_a_validation_loss_of_few_images_is_of_few_images():
    seen = []

    def predict(x, t, cond):
        seen.append(len(x))
        return Pair(x, x)

    images = np.random.default_rng(0).normal(size=(10, 1, 1, 4)).astype(np.float32)
    spaces = {"clean": targets.Clean()}
    few = np.zeros(10, np.int32)
    loss_by_log_snr(predict, paths.Linear(), images, few, jax.random.key(1), spaces=spaces)
    assert set(seen) == {10}
