"""A teacher that is another run: read before step 1, not part of the state, named by its hash."""

import json
from contextlib import closing
from dataclasses import dataclass, replace
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import register_dataclass
from safetensors.numpy import save_file

import diffjax
from configs import digits
from diffjax import choices
from diffjax.conditions import Classes
from diffjax.errors import UserError
from diffjax.loop import loop
from diffjax.loop.begin import restore_or_init
from diffjax.objectives.denoising import Denoising, pixel_mean
from diffjax.objectives.distillation.distribution_matching import DistributionMatching
from diffjax.runs import workdirs
from diffjax.runs.checkpoints import Checkpoints
from diffjax.runs.initial import by_path, weights_sha256
from diffjax.runs.setup import set_up
from diffjax.runs.teacher import find_teacher, read_teacher
from diffjax.spec import spec
from tests.support.tiny_network import Plain
from tests.support.tiny_run import on_one_device, trained_config, without_pictures

TESTS = {"allowed_packages": ("diffjax", "tests")}


@register_dataclass
@dataclass(frozen=True)
class Follow(Denoising):
    """The squared difference of the network from its teacher."""

    @property
    def traits(self):
        return replace(super().traits, has_teacher=True)

    def __call__(self, apply, params, teacher_params, key, batch, progress):
        t = self.times.quantile(self.uniforms(key, len(batch["image"])), self.path)
        noised = self.noised(t, key, batch)
        own, teachers = (self.evaluate(apply, each, noised) for each in (params, teacher_params))
        error = jnp.square(own - jax.lax.stop_gradient(teachers))
        return pixel_mean(error), self.metrics(noised)


def config_of(teacher, **changes):
    config = trained_config(num_steps=2, log_every_steps=1, **changes)
    config.unlock()
    config.teacher = str(teacher)
    config.objective = spec(
        Follow, **{name: part for name, part in config.objective.items() if name != "_target_"}
    )
    return config.lock()


def losses_of(workdir):
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    return [record["loss"] for record in map(json.loads, lines) if "loss" in record]


def test_a_run_learns_from_another_and_names_it_by_its_hash(
    trained_run, loaded_run, tmp_path, monkeypatch
):
    """One that begins with the teacher's weights has nothing to learn, up to rounding."""
    without_pictures(monkeypatch)
    on_one_device(monkeypatch)
    teacher = f"{trained_run}:ema-0.9"
    weights = loaded_run.weights("ema-0.9")
    same, other = tmp_path / "same", tmp_path / "other"
    loop.train(config_of(teacher, init_from=teacher), same)
    loop.train(config_of(teacher), other)
    assert losses_of(same)[0] < 1e-6 * losses_of(other)[0]

    noted = json.loads((same / "run.json").read_text())["teacher"]
    sha256 = weights_sha256(weights)
    assert noted == {"folder": str(trained_run), "weights": "ema-0.9", "step": 6, "sha256": sha256}


def test_the_state_is_that_of_a_run_without_a_frozen_teacher(trained_run):
    with_one, without = (
        set_up(config_of(name), (8, 8, 1), Classes(10)) for name in (trained_run, "live")
    )
    assert with_one.abstract == without.abstract
    assert find_teacher(without.parts) is None


def test_a_teacher_of_another_shape_is_refused_before_anything_is_written(trained_run, tmp_path):
    config = config_of(trained_run, model=spec(Plain))
    with pytest.raises(UserError, match=r"config.teacher=.* has no parameter Dense_0/bias \[16\]"):
        loop.train(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_teacher_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"config.teacher='nowhere' is neither a file"):
        loop.train(config_of("nowhere"), tmp_path / "run")


def test_a_teacher_that_changed_since_the_run_began_is_refused(trained_run, tmp_path):
    setup = set_up(config_of(trained_run), (8, 8, 1), Classes(10))
    workdirs.record(tmp_path, teacher={"folder": str(trained_run), "sha256": "of before"})
    with pytest.raises(UserError, match="has other weights than when this run began"):
        read_teacher(setup.parts, tmp_path)


@pytest.mark.parametrize("teacher", ["runs/digits", "live", "ema-0.9"])
def test_a_teacher_without_a_pupil_is_refused(teacher):
    with pytest.raises(UserError, match="this objective learns from no teacher; leave it at 'ema'"):
        set_up(trained_config(teacher=teacher), (8, 8, 1), Classes(10))


def distilling(teacher, arguments="objective=cd", **changes):
    config = trained_config(num_steps=2, **changes)
    config.unlock()
    other = digits.get_config(arguments)
    config.objective, config.precond, config.path = other.objective, other.precond, other.path
    config.sampling.solver = other.sampling.solver
    config.sampling.guidance_scale = 1.0
    config.evaluation.solvers = ("consistency",)
    config.teacher = str(teacher)
    return config.lock()


def test_what_distils_a_denoiser_needs_one():
    with pytest.raises(UserError, match=r"config.teacher='ema': .* name its run, as --config.tea"):
        set_up(distilling("ema"), (8, 8, 1), Classes(10))


def test_a_denoiser_on_another_path_is_refused_with_both(trained_run):
    message = r"config.path is Linear\(t_min=0.001, t_noise=1.0\), this run's EDM\(.*\): distil "
    with pytest.raises(UserError, match=message):
        find_teacher(set_up(distilling(trained_run), (8, 8, 1), Classes(10)).parts)


def test_a_teacher_has_no_embedding_of_the_scale_that_its_student_begins_with(tmp_path):
    """The student begins with its weights all the same, and the embedding is drawn."""
    config = distilling(tmp_path / "teacher.safetensors", "objective=guidance,model=dit").unlock()
    other = digits.get_config("objective=guidance,model=dit")
    config.model, config.wrappers, config.sampling = other.model, other.wrappers, other.sampling
    config.model.update(hidden_size=16, depth=1)
    config.evaluation.solvers, config.init_from = ("heun",), config.teacher
    setup = set_up(config.lock(), (8, 8, 1), Classes(10))
    embedding, mine = setup.wired.embedding_names, by_path(setup.abstract.params)
    theirs = {n: np.full(x.shape, 0.5, x.dtype) for n, x in mine.items() if n not in embedding}
    save_file(theirs, tmp_path / "teacher.safetensors")

    read: Any = find_teacher(setup.parts)
    assert by_path(read()[0]).keys() == theirs.keys()
    with closing(Checkpoints(tmp_path / "checkpoints")) as store:
        begun = by_path(restore_or_init(setup, store, cast(Any, None))[0].params)
    assert begun.keys() == mine.keys()
    for name, leaf in theirs.items():
        np.testing.assert_array_equal(begun[name], leaf, err_msg=name)
    assert any(np.any(begun[name]) for name in embedding)


def matching(teacher, **changes):
    """Distribution matching with the path and the target of `trained_run`."""
    config = trained_config(num_steps=3, log_every_steps=1, **changes)
    config.unlock()
    parts = {name: part for name, part in config.objective.items() if name != "_target_"}
    config.objective = spec(DistributionMatching, **parts, every=2)
    config.sampling.solver = choices.copy(choices.SOLVERS["consistency"])
    config.sampling.guidance_scale = 1.0
    config.evaluation.solvers = ("consistency",)
    config.teacher = config.init_from = str(teacher)
    return config.lock()


@pytest.mark.thorough
def test_a_second_network_begins_with_the_teachers_weights_and_learns_in_its_turns(
    trained_run, tmp_path, monkeypatch
):
    without_pictures(monkeypatch)
    on_one_device(monkeypatch)
    """At first its score is the teacher's, so that the network stays; then its turn is over."""
    config = matching(f"{trained_run}:live", checkpoint_every_steps=1, checkpoints_to_keep=3)
    loop.train(config, tmp_path / "run")
    teacher = jax.device_get(diffjax.load(trained_run, **TESTS).weights("live"))
    for step in (1, 2, 3):
        run = diffjax.load(tmp_path / "run", step=step, **TESTS)
        network = dict(jax.device_get(run.weights("live")))
        score = network.pop("fake_score")
        gaps = jax.tree.map(lambda a, b: np.abs(a - b).max(), (network, score), (teacher, teacher))
        of_network, of_score = (max(jax.tree.leaves(each)) for each in gaps)
        assert (of_network > 0.0) == (step == 3)
        assert 0.0 < of_score < 2.0 * step * float(config.optimizer.learning_rate)
