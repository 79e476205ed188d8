"""Averages of any length from snapshots: against the weights of the steps in closed form."""

import json
import shutil
from contextlib import closing

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.integrate import quad

import diffjax
from diffjax.data import digits
from diffjax.errors import UserError
from diffjax.loop import loop
from diffjax.loop.pending_metrics import NonFiniteLoss
from diffjax.loop.rollback import roll_back
from diffjax.runs.averages import (
    Profile,
    Snapshot,
    coefficients,
    inner_products,
    reconstruct,
    snapshots_of,
)
from diffjax.runs.checkpoints import Checkpoints
from diffjax.runs.setup import set_up
from diffjax.training.averages import Averages, gamma_of, power_name
from experiments import average, evaluate
from experiments.flags import cli
from tests.support.power_profiles import weights_of_steps
from tests.support.shared_parts import shared_parts
from tests.support.tiny_run import (
    arrays_of,
    assert_same,
    leave,
    loaded,
    of_noise,
    on_one_device,
    one_device,
    trained_config,
    without_pictures,
)

ALLOWED = ("diffjax", "tests")
LENGTHS = (0.05, 0.1)
STEPS, EVERY = 60, 6


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    shared_parts(monkeypatch)
    on_one_device(monkeypatch)


def stored(lengths=LENGTHS, steps=STEPS, every=EVERY):
    return [Profile(kept, n) for n in range(every, steps + 1, every) for kept in lengths]


@pytest.mark.parametrize("one", [Profile(0.05, 40), Profile(0.25, 100)])
@pytest.mark.parametrize("other", [Profile(0.1, 40), Profile(0.02, 70)])
def test_the_inner_product_of_two_profiles_is_their_integral(one, other):
    def density(profile, tau):
        gamma = gamma_of(profile.length)
        return (gamma + 1) * tau**gamma / float(profile.step) ** (gamma + 1)

    end = min(one.step, other.step)
    found, _ = quad(lambda tau: density(one, tau) * density(other, tau), 0, end, epsabs=1e-14)
    both = inner_products([one, other], [one, other])
    assert both[0, 1] == pytest.approx(found, rel=1e-8)
    assert both[1, 0] == pytest.approx(both[0, 1], rel=1e-12)


@pytest.mark.parametrize("wanted", [Profile(0.05, 60), Profile(0.1, 60), Profile(0.1, 36)])
def test_a_stored_average_is_reconstructed_by_itself_alone(wanted):
    profiles = stored()
    x, error = coefficients(profiles, wanted)
    expected = [float(profile == wanted) for profile in profiles]
    np.testing.assert_allclose(x, expected, atol=1e-10)
    assert error < 1e-6


@pytest.mark.parametrize("length", [0.03, 0.07, 0.15, 0.25])
def test_no_combination_of_sum_one_is_much_nearer_than_the_one_that_is_taken(length):
    """The error equals that by integration; random combinations nearby have larger errors."""
    profiles, wanted = stored(), Profile(length, STEPS)
    x, error = coefficients(profiles, wanted)
    assert x.sum() == pytest.approx(1.0, abs=1e-12)
    fine = 2_000  # cells of the run, of which each profile has the exact mass
    by_cell = np.zeros((len(profiles), fine))
    for row, profile in zip(by_cell, profiles, strict=True):
        cells = fine * profile.step // STEPS
        row[:cells] = weights_of_steps(profile.length, cells)
    target = weights_of_steps(length, fine)

    def distance(x):
        return np.linalg.norm(target - x @ by_cell) / np.linalg.norm(target)

    assert distance(x) == pytest.approx(error, rel=0.02)
    rng = np.random.default_rng(0)
    for scale in (1e-2, 1e-1):
        moves = rng.normal(size=(20, len(x))) * scale
        moves -= moves.mean(axis=1, keepdims=True)
        assert min(distance(x + move) for move in moves) > 0.99 * distance(x)


def test_more_snapshots_bring_every_length_nearer():
    for length in (0.03, 0.07, 0.2):
        errors = [
            coefficients(stored(steps=600, every=every), Profile(length, 600))[1]
            for every in (100, 50, 20, 5)
        ]
        assert errors == sorted(errors, reverse=True)
        assert errors[-1] < 3e-3


@pytest.fixture(scope="module")
def wandering(tmp_path_factory):
    """A run whose parameters went at random, and where they were after each step, in float64."""
    folder = tmp_path_factory.mktemp("averages") / "run"
    config = trained_config(ema_lengths=LENGTHS, snapshot_every_steps=EVERY)
    data = digits()
    run = of_noise(set_up(config, data.image_shape, data.condition, one_device()))
    leave(run, folder)
    averages, rng = Averages.of(config), np.random.default_rng(3)
    leaves, treedef = jax.tree.flatten(run.state.params)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, run.state.params)
    path = [1.0 + np.cumsum(0.1 * rng.normal(size=(STEPS, *leaf.shape)), axis=0) for leaf in leaves]
    # A random walk and a slow drift, in one.
    current = averages.init(run.state.params)
    update = jax.jit(averages.update)
    with closing(snapshots_of(folder)) as snapshots:
        for n in range(STEPS):
            here = [jnp.asarray(rows[n], jnp.float32) for rows in path]
            params = jax.device_put(jax.tree.unflatten(treedef, here), shardings)
            current = update(current, params, jnp.array(n))
            if (n + 1) % EVERY == 0:
                kept = {power_name(length): current[power_name(length)] for length in LENGTHS}
                snapshots.save(n + 1, Snapshot(kept), {})
    return folder, path


def test_reconstructed_averages_are_within_the_error_of_their_weights(wandering):
    """|Σ (p − Σ x·p_i)·(θ − c)| ≤ |p − Σ x·p_i|·|θ − c| (Cauchy-Schwarz), for each parameter, with
    θ piecewise constant over the steps and c its mean; float32 rounds the rest.
    """
    folder, path = wandering
    for length, step in ((0.1, 36), (0.07, 60)):
        made = reconstruct(folder, length, step, allowed_packages=ALLOWED)
        assert (made.name, made.step) == (power_name(length), step)
        assert made.num_snapshots == step // EVERY
        norm = np.sqrt(inner_products([Profile(length, step)], [Profile(length, step)]))
        found = read(folder, f"{made.name}@{step}")
        weights = weights_of_steps(length, step)
        for rows, mean in zip(path, jax.tree.leaves(found), strict=True):
            here = rows[:step]
            expected = np.tensordot(weights, here, axes=1)
            spread = np.sqrt(np.sum((here - here.mean(axis=0)) ** 2, axis=0))
            assert np.all(np.abs(mean - expected) <= made.error * norm * spread + 1e-5)
        if length in LENGTHS:
            assert made.error < 1e-6


def read(folder, name):
    run = diffjax.load(folder, weights=name, allowed_packages=ALLOWED)
    assert run.config.weights == name
    return jax.device_get(run.weights())


def test_the_command_line_makes_it_and_says_its_name(wandering, capsys):
    folder, _ = wandering
    here = [f"--workdir={folder}", "--allowed_packages=tests"]

    def run(*given):
        argv = [*here, *given]
        status = cli.run(average.main, average.FLAGS, usage=average.USAGE, argv=argv)
        return status, capsys.readouterr()

    status, said = run("--length=0.1", "--step=36")
    assert status == 0
    assert "power-0.1@36 from 6 snapshots; the error of its weights is" in said.out
    status, said = run("--length=0.1", "--step=35")
    assert status == 2
    assert said.err == f"error: {folder} has no snapshot of step 35; the nearest is 36\n"
    status, said = run()
    assert status == 2
    assert "--length is missing" in said.err


def test_the_same_command_makes_the_same_average_again(wandering):
    folder, _ = wandering
    once = reconstruct(folder, 0.08, 30, allowed_packages=ALLOWED)
    first = read(folder, "power-0.08@30")
    assert reconstruct(folder, 0.08, 30, allowed_packages=ALLOWED) == once
    assert_same(read(folder, "power-0.08@30"), first, rtol=0, atol=0)


def test_what_can_not_be_averaged_or_read_is_refused_in_one_line(wandering, trained_run, tmp_path):
    folder, _ = wandering

    def refused(said, **given):
        with pytest.raises(UserError, match=said):
            reconstruct(**{"workdir": folder, "length": 0.07, "allowed_packages": ALLOWED, **given})

    refused("no snapshot of step 31; the nearest is 30", step=31)
    refused("length=0.3 must be above 0 and at most 0.2886", length=0.3)
    refused("length=0 must be above 0", length=0)
    refused("has no snapshots of averages: train with --config.ema_lengths", workdir=trained_run)
    with pytest.raises(UserError, match=r"no weights power-0\.02@0: .*--length=0.02 --step=0"):
        read(folder, "power-0.02")
    with pytest.raises(UserError, match=r"this run has no weights 'ema-0\.5'"):
        read(folder, "ema-0.5")
    broken = shutil.copytree(folder, tmp_path / "broken")
    for file in (broken / "snapshots" / "12").rglob("*"):
        if file.is_file():
            file.write_bytes(b"")
    refused("checkpoint 12 is damaged.*made from the other", workdir=broken)
    shutil.rmtree(broken / "snapshots" / "12")
    made = reconstruct(broken, 0.07, allowed_packages=ALLOWED)
    assert made.num_snapshots == STEPS // EVERY - 1


def test_snapshots_of_steps_that_a_rollback_leaves_are_left_too(tmp_path):
    state = Snapshot({"power-0.05": jnp.ones(2)})
    with closing(Checkpoints(tmp_path / "checkpoints")) as checkpoints:
        with closing(snapshots_of(tmp_path)) as snapshots:
            for step in (2, 4, 6):
                snapshots.save(step, state, {})
        checkpoints.save(4, state, {})
        roll_back(tmp_path, checkpoints, NonFiniteLoss("line", "said", 7), allowed=1)
    with closing(snapshots_of(tmp_path)) as snapshots:
        assert snapshots.steps() == [2, 4]
    assert [path.name for path in (tmp_path / "snapshots_left").iterdir()] == ["6"]


@pytest.mark.thorough
def test_from_training_to_samples_and_resumed_without_duplicates(tmp_path, monkeypatch):
    without_pictures(monkeypatch)
    config, whole = trained_config(ema_lengths=LENGTHS), tmp_path / "whole"
    loop.train(config, whole)
    # Killed after step 5, when the newest checkpoint was that of step 2.
    resumed = shutil.copytree(whole, tmp_path / "resumed")
    for part, steps in {"checkpoints": (4, 6), "snapshots": (6,)}.items():
        for step in steps:
            shutil.rmtree(resumed / part / str(step))
    loop.train(config, resumed)
    for folder in (whole, resumed):
        with closing(snapshots_of(folder, read_only=True)) as snapshots:
            assert snapshots.steps() == [2, 4, 6]
    assert_same(arrays_of(resumed), arrays_of(whole), rtol=0, atol=0)
    run = loaded(whole)
    reconstruct(whole, 0.05, allowed_packages=ALLOWED)
    reconstruct(whole, 0.07, allowed_packages=ALLOWED)
    assert_same(read(whole, "power-0.05@6"), jax.device_get(run.weights("power-0.05")), rtol=1e-6)
    named = diffjax.load(whole, weights="power-0.07", allowed_packages=ALLOWED)
    images = named.sample(4, num_steps=1)
    np.testing.assert_array_equal(images, run.sample(4, num_steps=1, weights="power-0.07@6"))
    assert np.abs(images - run.sample(4, num_steps=1, weights="live")).max() > 1e-6
    argv = [f"--workdir={whole}", "--weights=power-0.07,power-0.05", "--allowed_packages=tests"]
    assert cli.run(evaluate.main, evaluate.FLAGS, usage="", argv=argv) == 0
    measured = json.loads((whole / "evaluation.json").read_text())
    assert measured["weights"] == "power-0.07"
