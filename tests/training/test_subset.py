"""A trainable subset: gradient, moments and averages are of it alone, and the rest stays."""

import json
import shutil
from itertools import islice

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import diffjax
from diffjax.conditions import Classes
from diffjax.data import batches, digits
from diffjax.ensemble.ensemble import train_together
from diffjax.errors import UserError
from diffjax.loop import loop
from diffjax.loop.compiled_step import train_step_of
from diffjax.objectives.base import Progress
from diffjax.runs.averages import reconstruct
from diffjax.runs.checkpoints import Checkpoints
from diffjax.runs.initial import by_path
from diffjax.runs.setup import set_up
from diffjax.training.sharding import make_mesh
from diffjax.training.state import LIVE
from diffjax.training.subset import merged, split
from tests.support.shared_parts import shared_parts
from tests.support.tiny_run import (
    arrays_of,
    assert_same,
    loaded,
    logged,
    on_one_device,
    one_device,
    tiny_config,
    trained_config,
    without_pictures,
)

HEAD = "final_conv/*"


def prepared(config, mesh=None):
    return set_up(config, (8, 8, 1), Classes(10), mesh)


def stepped(setup, num_steps=5):
    """The state after some steps, and the one it began with, on the host."""
    state = setup.init(jax.random.key(0))
    first = jax.device_get(state)
    step = jax.jit(train_step_of(setup))
    for batch in list_of_batches(setup, num_steps):
        state, _ = step(state, jax.random.key(1), batch)
    return first, jax.device_get(state)


def list_of_batches(setup, num_steps):
    stream = batches(digits().train, batch_size=setup.config.batch_size, seed=0)
    used = setup.wired.batch_shapes(setup.config.batch_size)
    taken = islice(stream, num_steps)
    return [{name: jnp.asarray(batch[name]) for name in used} for batch in taken]


def test_the_state_has_arrays_of_the_subset_alone():
    """Live, two averages and two moments of Adam; the frozen ones once."""
    whole = prepared(trained_config()).abstract
    abstract = prepared(trained_config(trainable=HEAD)).abstract
    sizes = {name: leaf.size for name, leaf in by_path(whole.params).items()}
    head = sum(size for name, size in sizes.items() if name.startswith("final_conv/"))
    assert 0 < head < sum(sizes.values())

    def size(tree):
        return sum(leaf.size for leaf in jax.tree.leaves(tree) if leaf.ndim)

    assert [size(part) for part in (abstract.params, abstract.opt_state, abstract.ema)] == [
        head,
        2 * head,
        2 * head,
    ]
    assert size(abstract.frozen) == sum(sizes.values()) - head
    assert size(abstract) == sum(sizes.values()) + 4 * head
    assert size(whole) == 5 * sum(sizes.values())
    for name in (LIVE, "ema-0.9", "ema-0.99"):
        assert {n: leaf.size for n, leaf in by_path(abstract.weights(name)).items()} == sizes


@pytest.mark.parametrize("pattern", ["*", "conv_in/*, embed/*,final_conv/*"])
def test_a_pattern_of_all_is_the_program_without_one(pattern):
    programs = []
    for trainable in ("", pattern):
        setup = prepared(trained_config(trainable=trainable))
        key = jax.eval_shape(lambda: jax.random.key(0))
        batch = setup.wired.batch_shapes(16)
        programs.append(str(jax.make_jaxpr(train_step_of(setup))(setup.abstract, key, batch)))
    assert programs[0] == programs[1]


@pytest.mark.parametrize(
    ("arguments", "trainable", "accumulation_steps"),
    [
        ("objective=ddpm,model=plain", "Embed_*/*,Dense_1/*", 2),
        pytest.param("model=tiny", HEAD, 1, marks=pytest.mark.thorough(tenth=False)),
        pytest.param(
            "objective=ddpm,model=dit",
            "*modulation/*,final_*",
            2,
            marks=pytest.mark.thorough(tenth=False),
        ),
    ],
)
def test_it_is_what_optax_makes_of_zero_updates_for_the_rest(
    arguments, trainable, accumulation_steps
):
    """The reference has all arrays; its clipping too is by the norm of the trainable gradient."""
    config = tiny_config(arguments, trainable=trainable, accumulation_steps=accumulation_steps)
    with config.unlocked():
        config.model.update({"dropout": 0.0} if "dropout" in config.model else {})
    setup = prepared(config, make_mesh(devices=jax.devices()[:1]))
    first, last = stepped(setup)
    wired = setup.wired
    params = first.weights(LIVE)
    labels = jax.tree_util.tree_map_with_path(
        lambda path, _: "train" if _trains(path, first.params) else "freeze", params
    )
    rules = {"train": setup.optimizer.transform, "freeze": optax.set_to_zero()}
    reference = optax.multi_transform(rules, labels)
    opt_state = reference.init(params)
    averages = dict.fromkeys((0.9, 0.99), params)

    @jax.jit
    def step(n, params, averages, opt_state, batch):
        label_key, key = jax.random.split(jax.random.fold_in(jax.random.key(1), n))
        dropped = jax.random.bernoulli(label_key, 0.1, batch["label"].shape)
        batch = {**batch, "cond": jnp.where(dropped, 10, batch["label"])}

        def loss(params):
            each, _ = wired.objective(
                wired.apply, params, averages[0.9], key, batch, Progress(jnp.asarray(n), ())
            )
            return jnp.mean(each)

        updates, opt_state = reference.update(jax.grad(loss)(params), opt_state, params)
        params = optax.apply_updates(params, updates)
        rates = {d: jnp.minimum(d, (1.0 + n) / (10.0 + n)) for d in averages}
        averages = {
            d: jax.tree.map(lambda a, p, d=d: a + (1 - rates[d]) * (p - a), average, params)
            for d, average in averages.items()
        }
        return params, averages, opt_state

    for n, batch in enumerate(list_of_batches(setup, 5)):
        params, averages, opt_state = step(n, params, averages, opt_state, batch)
    frozen = by_path(first.frozen)
    found = {LIVE: params, "ema-0.9": averages[0.9], "ema-0.99": averages[0.99]}
    for name, expected in found.items():
        mine = by_path(last.weights(name))
        for path, leaf in by_path(expected).items():
            if path in frozen:
                np.testing.assert_array_equal(mine[path], frozen[path], err_msg=path)
            else:
                np.testing.assert_allclose(mine[path], leaf, rtol=2e-5, atol=2e-7, err_msg=path)
    moved = by_path(last.params)
    assert all(np.any(moved[path] != leaf) for path, leaf in by_path(first.params).items())


def _trains(path, trained):
    for key in path:
        if key.key not in trained:
            return False
        trained = trained[key.key]
    return True


@pytest.mark.thorough(tenth=False)
def test_the_two_parts_are_the_whole():
    params = prepared(tiny_config("model=unet")).wired.params_shape
    for trainable in ("*attention*", "*/kernel", "conv_in/bias"):
        parts = split(params, trainable)
        names = [set(by_path(part)) for part in parts]
        assert names[0], trainable
        assert names[0].isdisjoint(names[1])
        assert by_path(merged(*parts)) == by_path(params)


@pytest.mark.parametrize(
    ("trainable", "says"),
    [
        ("final_convv/*", r"no parameter matches 'final_convv/\*'; did you mean 'final_conv'"),
        (f"{HEAD},*haed*", r"no parameter matches '\*haed\*'; known: conv_in, embed, final_conv"),
        ("kernel", r"no parameter matches 'kernel'; did you mean 'kernel'"),
    ],
)
def test_patterns_that_match_nothing_are_refused_with_the_nearest_names(trainable, says):
    with pytest.raises(UserError, match=says):
        prepared(trained_config(trainable=trainable))


@pytest.fixture(scope="module")
def tuned(trained_run, tmp_path_factory):
    """The head of a trained run, trained on."""
    workdir = tmp_path_factory.mktemp("tuned") / "run"
    config = trained_config(init_from=f"{trained_run}:live", trainable=HEAD)
    with pytest.MonkeyPatch.context() as patch:
        without_pictures(patch)
        on_one_device(patch)
        shared_parts(patch)
        loop.train(config, workdir)
    return workdir


@pytest.fixture(scope="module")
def tuned_run(tuned):
    """The same, loaded; to be read."""
    return loaded(tuned, mesh=one_device())


def test_the_frozen_are_those_that_it_began_with_and_stored_once(tuned, tuned_run, loaded_run):
    begun, run = by_path(loaded_run.weights(LIVE)), tuned_run
    for name in (LIVE, "ema-0.9", "ema-0.99"):
        for path, leaf in by_path(run.weights(name)).items():
            if path.startswith("final_conv/"):
                assert np.any(np.asarray(leaf) != begun[path]), path
            else:
                np.testing.assert_array_equal(leaf, begun[path], err_msg=path)
    assert len(list((tuned / "frozen").glob("[0-9]*"))) == 1
    for step in (0, 2, 4, 6):
        metadata = (tuned / "checkpoints" / str(step) / "state" / "_METADATA").read_text()
        assert "final_conv" in metadata
        assert "conv_in" not in metadata
    facts = json.loads((tuned / "run.json").read_text())
    assert facts["num_trained_params"] == sum(
        leaf.size for leaf in jax.tree.leaves(run.state.params)
    )


def test_a_resumed_run_is_the_undisturbed_one(tuned, tuned_run, tmp_path, monkeypatch):
    without_pictures(monkeypatch)
    on_one_device(monkeypatch)
    shared_parts(monkeypatch)
    copy = shutil.copytree(tuned, tmp_path / "run")
    for step in ("4", "6"):
        shutil.rmtree(copy / "checkpoints" / step)
    loop.train(tuned_run.config, copy)
    assert logged(copy) == logged(tuned)
    assert_same(arrays_of(copy), jax.device_get(tuned_run.state._asdict()), rtol=0, atol=0)
    assert len(list((copy / "frozen").glob("[0-9]*"))) == 1


@pytest.mark.thorough
def test_another_run_begins_with_all_of_it(tuned, tmp_path, monkeypatch):
    """From live and averages alike the frozen ones are read with the rest."""
    without_pictures(monkeypatch)
    shared_parts(monkeypatch)
    config = trained_config(init_from=f"{tuned}:ema-0.9", num_steps=2)
    loop.train(config, tmp_path / "run")
    setup = prepared(config)
    store = Checkpoints(tmp_path / "run" / "checkpoints", read_only=True)
    state, _ = store.read(0, setup.abstract)
    store.close()
    assert not jax.tree.leaves(state.frozen)
    assert_same(state.params, loaded(tuned).weights("ema-0.9"), rtol=0, atol=0)


@pytest.mark.thorough
def test_an_average_made_after_training_has_the_frozen_parameters_too(tmp_path, monkeypatch):
    without_pictures(monkeypatch)
    shared_parts(monkeypatch)
    config = trained_config(trainable=HEAD, ema_lengths=(0.05, 0.1), snapshot_every_steps=2)
    loop.train(config, tmp_path / "run")
    reconstruct(tmp_path / "run", 0.07, allowed_packages=("diffjax", "tests"))
    run = loaded(tmp_path / "run")
    average, live = by_path(run.weights("power-0.07")), by_path(run.weights(LIVE))
    assert average.keys() == live.keys()
    for path in by_path(run.state.frozen):
        np.testing.assert_array_equal(average[path], live[path], err_msg=path)
    assert np.any(average["final_conv/kernel"] != live["final_conv/kernel"])


# Orbax closes the loop that its threads of other arrays still report to.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("how", ["gone", "changed"])
def test_frozen_parameters_that_are_lost_are_named_and_no_checkpoint_is_set_aside(
    tuned, tuned_run, tmp_path, monkeypatch, how
):
    without_pictures(monkeypatch)
    shared_parts(monkeypatch)
    copy = shutil.copytree(tuned, tmp_path / "run")
    (stored,) = (copy / "frozen").glob("[0-9]*")
    if how == "gone":
        shutil.rmtree(copy / "frozen")
    else:
        for file in stored.rglob("*"):
            if file.is_file() and "ocdbt" not in file.name and file.parent.name == "d":
                content = bytearray(file.read_bytes())
                content[len(content) // 2] ^= 1
                file.write_bytes(content)
    says = r"frozen parameters of checkpoint 6 are damaged or gone: bring .*frozen/\d+ back"
    with pytest.raises(UserError, match=says):
        diffjax.load(copy, allowed_packages=("diffjax", "tests"))
    with pytest.raises(UserError, match=says):
        loop.train(tuned_run.config, copy)
    assert sorted(each.name for each in (copy / "checkpoints").glob("[0-9]*")) == list("0246")
    assert not (copy / "checkpoints_damaged").exists()


@pytest.mark.thorough(tenth=False)
def test_it_is_split_over_a_mesh_as_it_is_without_patterns(tuned, tuned_run):
    config = trained_config(trainable=HEAD)
    with config.unlocked():
        config.mesh.update(data=1, fsdp=4, tensor=2)
    setup, whole = prepared(config), prepared(trained_config())
    store = Checkpoints(tuned / "checkpoints", read_only=True)
    state, _ = store.read(6, setup.abstract)
    store.close()
    assert jax.tree.map(lambda leaf: leaf.sharding, state) == setup.shardings
    assert not state.frozen["embed"]["embedding"].sharding.is_fully_replicated
    assert_same(state.weights(LIVE), tuned_run.weights(LIVE), rtol=0, atol=0)
    assert set(by_path(setup.abstract.weights(LIVE))) == set(by_path(whole.abstract.params))
    state, metrics = jax.jit(train_step_of(setup))(
        state, jax.random.key(0), list_of_batches(setup, 1)[0]
    )
    assert np.isfinite(metrics["loss"])


@pytest.mark.thorough
def test_members_of_an_ensemble_are_what_they_are_by_themselves(tmp_path, monkeypatch):
    without_pictures(monkeypatch)
    shared_parts(monkeypatch)
    configs = [trained_config(trainable=HEAD, num_steps=4, seed=seed) for seed in (0, 1)]
    folders = [tmp_path / name for name in ("a", "b")]
    train_together(configs, folders)
    for config, folder in zip(configs, folders, strict=True):
        loop.train(config, tmp_path / "alone" / folder.name)
        alone = arrays_of(tmp_path / "alone" / folder.name)
        assert_same(arrays_of(folder), alone, rtol=1e-5, atol=1e-6)
        assert_same(arrays_of(folder)["frozen"], alone["frozen"], rtol=0, atol=0)
