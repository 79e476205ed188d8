"""Published networks as runs: recognised, with the recipe and the samples of their authors."""

import json
import os
import re
import shutil
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

import diffjax
from diffjax import choices, lookup
from diffjax.codecs import SpaceToDepth
from diffjax.codecs.autoencoders import Variational, write_autoencoder
from diffjax.conditions import Classes
from diffjax.errors import UserError
from diffjax.host.files import write_json
from diffjax.models.adm.published import CLASSIFIER
from diffjax.models.adm.published import FAMILY as ADM
from diffjax.models.autoencoder_kl.network import AutoencoderKL
from diffjax.models.autoencoder_kl.published import FAMILY as AUTOENCODER_KL
from diffjax.models.dit.published import FAMILY as DIT
from diffjax.models.dit.sizes import SIZES as DIT_SIZES
from diffjax.models.families import LAYOUTS
from diffjax.models.jit.network import JiT
from diffjax.models.sit.published import FAMILY as SIT
from diffjax.pretrained.family import Size
from diffjax.pretrained.files import read_state_dict, write_safetensors
from diffjax.process.paths import coeffs
from diffjax.runs.samples.model import Request
from diffjax.sampling import solvers
from diffjax.sampling.guidance import Classifier, ClassifierFree, FirstChannels, OtherWeights
from diffjax.sampling.sample import interval_of, last_step, sample_padded
from diffjax.spec import build
from experiments import evaluate, sample
from experiments.flags import cli
from tests.models.published.test_families import SMALL
from tests.models.published.test_families import drawn as drawn_params
from tests.references import dit_sampling as theirs
from tests.references.dit import drawn
from tests.support.compilations import compilations

FAMILIES = {family.name: family for family in (DIT, SIT)}


def stored(name):
    with np.load(theirs.FOLDER / f"{name}_sampling.npz", allow_pickle=False) as arrays:
        return dict(arrays)


def write(folder, name):
    """The file of the network that the authors' code sampled."""
    family = FAMILIES[name]
    shape = (theirs.SIDE, theirs.SIDE, theirs.CHANNELS)
    network = family.network(shape, theirs.NUM_CLASSES, **theirs.SETTINGS)
    nothing = jax.tree.map(lambda leaf: np.zeros(leaf.shape), family.shapes(network))
    shapes = {key: array.shape for key, array in family.to_theirs(nothing, network).items()}
    shapes.pop("pos_embed")
    state = drawn(shapes) | {"pos_embed": stored(name)["pos_embed"]}
    folder.mkdir(exist_ok=True)
    path = folder / f"{name}-small.safetensors"
    write_safetensors(path, state)
    return path


@pytest.fixture(scope="module", params=FAMILIES)
def model(request, tmp_path_factory):
    path = write(tmp_path_factory.mktemp("published"), request.param)
    return diffjax.from_pretrained(path, num_heads=theirs.SETTINGS["num_heads"])


def assert_close(found, expected, tolerance):
    assert found.shape == expected.shape
    assert np.linalg.norm(found - expected) < tolerance * np.linalg.norm(expected)


def from_their_noise(denoise, solver, path, times, keys, x):
    return sample_padded(denoise, solver, path, times, keys, jnp.asarray(theirs.NOISE))


@pytest.mark.parametrize(
    "model", ["DiT", pytest.param("SiT", marks=pytest.mark.thorough(tenth=False))], indirect=True
)
def test_samples_are_those_of_the_authors_sampler(model):
    """DDIM on every 111th step of DDPM's table, and Euler's steps in equal times."""
    name = {"DiT": "ddim", "SiT": "euler"}[model.family]
    recipe = replace(model.recipe, solver=lookup.solver_called(name), num_steps=theirs.NUM_STEPS)
    times = recipe.times(model.parts.wired.path)
    found = model.model().walk(from_their_noise, recipe, Request(theirs.LABELS), times)
    assert_close(found, stored(model.family)[name], 1e-4)


@pytest.mark.thorough
def test_guided_predictions_are_those_of_the_authors_code(model):
    """`forward_with_cfg`: three of four channels guided, and the variance that of the labels."""
    t = {"DiT": 322 / 1000, "SiT": 1 - 0.321}[model.family]
    labels, wired = jnp.asarray(theirs.LABELS), model.parts.wired
    x, times = jnp.asarray(theirs.NOISE), jnp.full(len(theirs.NOISE), t, jnp.float32)
    pair = jax.jit(model.model().guided(model.recipe))(x, times, labels)
    expected = stored(model.family)["guided"]
    if wired.objective.traits.learned_variance:
        assert_close(pair.eps, expected[..., : theirs.CHANNELS], 1e-5)
        assert_close(2.0 * pair.share - 1.0, expected[..., theirs.CHANNELS :], 1e-5)
    else:
        assert_close(pair.x0 - pair.eps, expected, 1e-5)


@pytest.mark.thorough
@pytest.mark.parametrize("model", ["DiT"], indirect=True)
def test_ddpm_with_learned_variances_is_that_of_the_authors(model, monkeypatch):
    fresh = iter(theirs.FRESH)
    monkeypatch.setattr(solvers, "normal", lambda keys, shape: jnp.asarray(next(fresh)))

    def walk(denoise, solver, path, times, keys, x):
        x, memory = jnp.asarray(theirs.NOISE), solver.init(x)
        for i in range(theirs.NUM_STEPS - 1):
            x, memory = solver.step(denoise, interval_of(path, times, i, keys), memory, x)
        return last_step(denoise, solver, x, times[-2])

    recipe = replace(model.recipe, num_steps=theirs.NUM_STEPS)  # solver and grid are its own
    times = recipe.times(model.parts.wired.path)
    found = model.model().walk(walk, recipe, Request(theirs.LABELS), times)
    assert_close(found, stored("DiT")["ddpm"], 1e-4)


def test_the_recipe_and_what_numbers_depend_on_are_those_of_the_publication(model):
    wired, family = model.parts.wired, model.family
    assert model.recipe.guidance == FirstChannels(ClassifierFree(), channels=3)
    assert model.recipe.guidance_scale == 4.0
    assert model.recipe.nfe == {"DiT": 2 * 250, "SiT": 2 * (2 * 124 + 1)}[family]
    assert wired.objective.traits.learned_variance == (family == "DiT")
    assert wired.condition == Classes(theirs.NUM_CLASSES)
    assert model.config.sampling.guidance.channels == 3  # as flags and the page of a run have it
    assert (
        model.facts["noise_label"]
        == {
            "DiT": "TimeLabel(scale=1000.0, offset=-1.0, whole=False)",
            "SiT": "TimeLabel(scale=-1.0, offset=1.0, whole=False)",
        }[family]
    )
    assert "codec: not stated" in model.describe()
    assert repr(model).startswith("Pretrained(")
    with pytest.raises(UserError, match="has weights alone, no state of a training"):
        _ = model.state
    with pytest.raises(UserError, match=r"has no weights 'ema-0\.9'"):
        model.sample([0], weights="ema-0.9")


def test_samples_are_drawn_and_decoded_as_those_of_a_run(tmp_path):
    path = write(tmp_path, "SiT")
    with compilations() as loading:
        found = diffjax.from_pretrained(path, codec=SpaceToDepth(2), num_heads=2)
    assert not loading
    how = {"solver": "euler", "num_steps": 2, "guidance_scale": 1.0}
    images = found.sample([3, 1, 3], **how)
    latents = found.model().sample_latents(
        replace(found.recipe, solver=solvers.euler(), num_steps=2, guidance_scale=1.0),
        Request(np.array([3, 1, 3], np.int32)),
    )
    assert images.shape == (3, 16, 16, 1)
    np.testing.assert_array_equal(images, SpaceToDepth(2).decoder()(latents))
    with compilations() as again:
        found.sample([0, 2, 4], **how)
    assert not again


def test_what_can_not_be_read_ends_in_one_line(tmp_path):
    path = write(tmp_path, "DiT")

    def refused(where=path, **how):
        with pytest.raises(UserError) as error:
            diffjax.from_pretrained(where, **{"num_heads": 2, **how})
        assert "\n" not in str(error.value)
        return str(error.value)

    shutil.copy(path, tmp_path / "model.safetensors")
    assert "pass family='DiT' or family='SiT'" in refused(tmp_path / "model.safetensors")
    write_safetensors(tmp_path / "x.safetensors", {"a": np.ones(3, np.float32)})
    assert "has the tensors of no network that is known (DiT, SiT" in refused(
        tmp_path / "x.safetensors"
    )
    assert "did you mean 'DiT'" in refused(family="DiTs")
    assert "did you mean 'num_heads'" in refused(num_head=2)
    assert "did you mean 'sd-vae-ft-ema'" in refused(codec="sd-vae-ft-em")
    assert "pass the path of its file" in refused(codec="sd-vae-ft-ema")
    assert "latents of 9 channels" in refused(codec=SpaceToDepth(3))
    assert "No such file" in refused(tmp_path / "none.pt")
    nearly = tmp_path / "DiT-smal.safetensors"
    assert f"did you mean '{path}'" in refused(nearly)
    assert "no setting 'channels'; did you mean 'out_channels'" in refused(channels=3)
    assert "num_heads='2' must be a whole number" in refused(num_heads="2")
    assert "image_shape=(8, 8) must have 3 elements" in refused(image_shape=(8, 8))
    assert "sizes of images are above 0" in refused(image_shape=(8, 8, 0))
    assert "did you mean 'SiT'" in refused(family="sit")
    os.mkfifo(tmp_path / "pipe")
    assert "it is no file" in refused(tmp_path / "pipe")
    assert "codec='' is empty" in refused(codec="")
    assert "it has neither config.json nor model_index.json; name a file of it" in refused(tmp_path)
    (tmp_path / "F").mkdir()
    (tmp_path / "F" / "model_index.json").write_text("{}")
    assert "copy or download it again" in refused(tmp_path / "F")
    names = {"y_embedder.embedding_table.weight": np.zeros((0, 16), np.float32)}
    write_safetensors(tmp_path / "DiT-0.safetensors", read_state_dict(path) | names)
    assert "it has no classes at all" in refused(tmp_path / "DiT-0.safetensors")


def changed(change):
    def state(path):
        return {name: change(np.asarray(x)) for name, x in read_state_dict(path).items()}

    return state


@pytest.mark.parametrize(
    "state",
    [
        changed(lambda x: x.astype(np.float16)),
        changed(lambda x: x.astype(jnp.bfloat16)),
        lambda path: {f"module._orig_mod.{k}": x for k, x in read_state_dict(path).items()},
    ],
    ids=["float16", "bfloat16", "wrapped for training"],
)
def test_files_in_half_precision_and_of_wrapped_networks_are_read(state, tmp_path):
    path = write(tmp_path, "DiT")
    write_safetensors(tmp_path / "DiT-other.safetensors", state(path))
    whole = diffjax.from_pretrained(path, num_heads=2).params
    found = diffjax.from_pretrained(tmp_path / "DiT-other.safetensors", num_heads=2).params
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, 2**-8, 1e-7), found, whole)


def test_settings_that_a_file_does_not_show_are_flags(tmp_path, capsys):
    path = write(tmp_path, "DiT")

    def run(*more):
        argv = [f"--pretrained={path}", "--num_samples=1", "--num_steps=1", "--solver=ddim"]
        argv += [f"--out={tmp_path}/x.png", *more]
        status = cli.run(sample.main, sample.FLAGS, usage="", argv=argv)
        return status, capsys.readouterr().err

    heads = f"--network=num_heads={theirs.SETTINGS['num_heads']}"
    assert run(heads, "--network=dtype=float32")[0] == 0
    for flags, said in (
        ((), "to read it, add num_heads"),
        (("--network=num_heads",), "is not of the form setting=value"),
        ((heads, heads), "has the setting 'num_heads' twice"),
        (("--network=num_heads=two",), "num_heads='two' must be a whole number"),
        ((heads, "--codec="), "--codec= is empty"),
        ((heads, "--against=weights:"), "name the weaker weights"),
    ):
        status, error = run(*flags)
        assert status == 2
        assert said in error
        assert error.count("\n") == 1


def test_an_autoencoder_of_no_published_size_decodes_samples(tmp_path):
    """In a folder of diffusers, and in a run that trained it; neither of which draws samples."""
    path = write(tmp_path, "DiT")
    network = AutoencoderKL(channels=(8, 16), num_groups=4, latent_channels=theirs.CHANNELS)
    params = drawn_params(AUTOENCODER_KL, network)
    write_autoencoder(tmp_path / "vae", Variational(network), params, 0.5, 0.1)
    for place in (tmp_path / "vae", tmp_path):
        model = diffjax.from_pretrained(path, num_heads=2, codec=place)
        assert model.parts.codec.name == "autoencoder"
    assert model.sample([0], num_steps=1, solver="ddim").shape == (1, 16, 16, 3)
    with pytest.raises(UserError, match="draws no samples; it is a codec="):
        diffjax.from_pretrained(tmp_path / "vae")
    with pytest.raises(UserError, match="is a folder of diffusers, not a run"):
        diffjax.load(tmp_path / "vae")
    write_json(tmp_path / "config.json", {"autoencoder": {}})
    with pytest.raises(UserError, match="is the run of an autoencoder, which draws no samples"):
        diffjax.load(tmp_path)


@pytest.mark.parity
def test_of_a_checkpoint_of_their_training_the_averages_are_read(tmp_path):
    import argparse

    import torch

    state = read_state_dict(write(tmp_path, "DiT"))
    model = {name: torch.tensor(np.asarray(tensor)) for name, tensor in state.items()}
    ema = {name: 2 * tensor for name, tensor in model.items()} | {"pos_embed": model["pos_embed"]}
    path = tmp_path / "0400000.pt"
    torch.save({"model": model, "ema": ema, "opt": {}, "args": argparse.Namespace(lr=1e-4)}, path)
    found = diffjax.from_pretrained(path, family="DiT", num_heads=2)
    bias = np.asarray(found.params["final_out"]["bias"])
    np.testing.assert_array_equal(bias, ema["final_layer.linear.bias"].numpy())


@pytest.mark.thorough
def test_a_published_file_is_sampled_on_the_command_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(DIT_SIZES, "DiT-tiny", Size(theirs.SETTINGS, 0))
    path = write(tmp_path, "DiT")
    argv = [f"--pretrained={path}", "--num_samples=3", "--num_steps=2", "--labels=1,4"]
    assert cli.run(sample.main, sample.FLAGS, usage="", argv=argv) == 0
    assert "solver=ddpm_learned, grid=linspace, num_steps=2" in capsys.readouterr().out
    with np.load(tmp_path / "DiT-small" / "samples" / "seed_0.npz") as saved:
        assert saved["images"].shape == (3, theirs.SIDE, theirs.SIDE, theirs.CHANNELS)
        assert saved["labels"].tolist() == [1, 4, 1]
    for more, said in (
        (["--labels=5"], "there is no label|no label is called"),
        (["--step=3"], "one set of weights"),
        (["--pretrained=none.pt"], "can't read weights from none.pt: No such file"),
        (["--pretrained="], r"can't read config\.json"),
        (["--against=weights:none.pt"], "neither of this run's"),
        (["--against=classifier"], "name the file of the classifier"),
        (["--against=classifier:none.pt"], "can't read weights from none.pt: No such file"),
        ([f"--against=classifier:{path}"], "a network of DiT, not a classifier"),
    ):
        assert cli.run(sample.main, sample.FLAGS, usage="", argv=[*argv, *more]) == 2
        assert re.search(said, capsys.readouterr().err)
    for alone, said in (
        ([f"--workdir={path}"], "is a file: name it by --pretrained"),
        ([f"--workdir={tmp_path}", "--codec=taef2"], "goes with --pretrained"),
        ([], "--workdir is missing, or --pretrained=FILE"),
    ):
        assert cli.run(sample.main, sample.FLAGS, usage="", argv=alone) == 2
        assert re.search(said, capsys.readouterr().err)


def test_a_second_file_guides_the_first(tmp_path, monkeypatch):
    """Autoguidance: `off + scale·(on - off)`, of two files."""
    for family in (DIT, SIT):
        monkeypatch.setitem(family.sizes, "tiny", Size(theirs.SETTINGS, 0))
    strong, weak = (write(tmp_path / name, "SiT") for name in ("strong", "weak"))
    state = {name: 0.5 * np.asarray(tensor) for name, tensor in read_state_dict(weak).items()}
    write_safetensors(weak, state | {"pos_embed": stored("SiT")["pos_embed"]})
    found, other = (diffjax.from_pretrained(path) for path in (strong, weak))
    recipe = replace(found.recipe, guidance=ClassifierFree(), guidance_scale=3.0)
    recipe = replace(recipe, against=OtherWeights(str(weak)))
    x, labels = jnp.asarray(theirs.NOISE), jnp.asarray(theirs.LABELS)
    where = x, jnp.full(len(x), 0.5), labels
    models = found.model().guided(recipe), found.model().predict(), other.model().predict()
    guided, on, off = jax.jit(lambda *where: [model(*where) for model in models])(*where)
    assert_close(guided.x0, off.x0 + 3.0 * (on.x0 - off.x0), 1e-5)
    assert found.model().weaker(recipe) is found.model().weaker(recipe)


def small_adm(folder, monkeypatch, family, name, **settings):
    """A published file of a small network of ADM."""
    size = Size({**SMALL[family.name], "image_shape": (8, 8, 3), **settings}, 0)
    monkeypatch.setitem(family.sizes, "small", size)
    network = family.size("small")
    path = folder / name
    write_safetensors(path, family.to_theirs(drawn_params(family, network), network))
    return path


@pytest.mark.thorough(tenth=False)  # in parts: test_classifiers.py
def test_a_classifier_guides_a_published_network(tmp_path, monkeypatch):
    """Their `condition_score`: eps less s·scale·∇ log p(label | x), along one direction."""
    path = small_adm(tmp_path, monkeypatch, ADM, "adm.safetensors", num_classes=5)
    file = small_adm(tmp_path, monkeypatch, CLASSIFIER, "classifier.safetensors", num_classes=5)
    found = diffjax.from_pretrained(path)
    with pytest.raises(UserError, match="or guide against=weights:RUN or against=classifier:FILE"):
        found.sample([1], guidance_scale=2.0)
    recipe = replace(found.recipe, against=Classifier(str(file)), guidance_scale=1.0 + 0.7)
    rng, labels = np.random.default_rng(0), jnp.array([1, 4])
    x, direction = (jnp.asarray(rng.normal(size=(2, 8, 8, 3)), jnp.float32) for _ in "ab")
    t = jnp.full(2, 0.301)
    guide, predict = found.model().guided(recipe), found.model().predict()
    network, params = CLASSIFIER.read(file)

    @jax.jit
    def evaluated(x, t, labels, direction):
        both = jnp.concatenate([x + 0.01 * direction, x - 0.01 * direction])
        logits = network.network.apply({"params": params}, both, 1000.0 * jnp.tile(t, 2) - 1.0)
        log_p = jax.nn.log_softmax(logits)[jnp.arange(4), jnp.tile(labels, 2)]
        return guide(x, t, labels), predict(x, t, labels), log_p

    guided, alone, log_p = evaluated(x, t, labels, direction)
    by_differences = (log_p[:2] - log_p[2:]) / 0.02
    c = coeffs(found.parts.wired.path, t, 4)
    moved = jnp.sum((alone.eps - guided.eps) * direction, (1, 2, 3))
    assert_close(moved, 0.7 * c.s.ravel() * by_differences, 1e-2)
    assert_close(c.a * guided.x0 + c.s * guided.eps, x, 1e-5)
    np.testing.assert_array_equal(guided.share, alone.share)
    three = small_adm(tmp_path, monkeypatch, CLASSIFIER, "three.safetensors", num_classes=3)
    for other, said in (
        (three, "its number of classes is 3, not 5"),
        (path, "has a network of ADM, not a classifier"),
    ):
        with pytest.raises(UserError, match=said):
            found.sample([1], guidance_scale=2.0, against=f"classifier:{other}")


def test_jit_of_512_pixels_has_twice_the_noise_and_the_same_interval_of_time():
    """Guided from their time 0.1 on, where the signal is 0.1 and the noise 0.9 or 1.8."""
    family: Any = LAYOUTS[JiT]["authors"]
    for size, noise in (("JiT-B/16", 0.9), ("JiT-B/32", 1.8)):
        record = family.published(family.size(size))
        config = ConfigDict({"name": size})
        lookup.set_axes(config, record.objective, {"": ConfigDict()}, model="")
        c = coeffs(build(config.path), jnp.array([0.9]), 1)
        np.testing.assert_allclose([c.a[0], c.s[0]], [0.1, noise], rtol=1e-5)
        limit = lookup.guidance_called(record.guidance).low
        np.testing.assert_allclose(limit, 2 * np.log(0.1 / noise), atol=1e-3)


@pytest.mark.thorough
def test_a_published_file_is_evaluated_on_latents(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(DIT_SIZES, "DiT-tiny", Size(theirs.SETTINGS, 0))
    path, out = write(tmp_path, "DiT"), tmp_path / "results"
    rng = np.random.default_rng(0)
    shape = (60, theirs.SIDE, theirs.SIDE, theirs.CHANNELS)
    labels = (np.arange(60) % theirs.NUM_CLASSES).astype(np.int32)
    np.savez(tmp_path / "x.npz", latents=rng.normal(size=shape).astype(np.float32), labels=labels)
    argv = [f"--pretrained={path}", f"--workdir={out}", f"--data_path={tmp_path / 'x.npz'}"]
    argv += ["--num_samples=12", "--solvers=", "--num_steps=", "--guidance_scale=1,2"]
    assert cli.run(evaluate.main, evaluate.FLAGS, usage="", argv=argv) == 0
    assert "report.html" in capsys.readouterr().out
    record = json.loads((out / "run.json").read_text())["published"]
    assert record["noise_label"] == "TimeLabel(scale=1000.0, offset=-1.0, whole=False)"
    assert record["file"] == str(path)
    assert record["sha256"] in (out / "report.html").read_text()
    assert json.loads((out / "evaluation.json").read_text())["weights"] == "live"


PUBLISHED: dict[str, Any] = {
    family.name: (kind.__name__, family)
    for kind, layouts in LAYOUTS.items()
    for family in layouts.values()
    if family.published is not None
}


def test_every_record_has_names_that_there_are():
    for _, family in PUBLISHED.values():
        record = family.published(family.size(next(iter(family.sizes))))
        config = ConfigDict({"name": family.name})
        lookup.set_axes(config, record.objective, {"": ConfigDict()}, model="")
        lookup.guidance_called(record.guidance)
        assert record.solver in choices.SOLVERS, family.name
        assert record.grid in choices.GRIDS, family.name
        assert record.codec in ("", *choices.CODECS), family.name


@pytest.mark.thorough(tenth=False)
@pytest.mark.parametrize("name", PUBLISHED)
def test_every_family_with_a_record_draws_samples(name, tmp_path, monkeypatch):
    """Of a small size, as if it were published."""
    kind, family = PUBLISHED[name]
    settings = SMALL.get(name, {})
    height, *others = settings.get("image_shape", (8,))
    square = {"image_shape": (height, height, *others[1:])} if others else {}
    monkeypatch.setitem(family.sizes, "small", Size({**settings, **square}, 0))
    network = family.size("small")
    path = tmp_path / "small.safetensors"
    write_safetensors(path, family.to_theirs(drawn_params(family, network), network))
    found = diffjax.from_pretrained(path, family=kind)
    samples = found.sample(found.parts.wired.condition.example(2), num_steps=2)
    assert found.family == name
    assert len(samples) == 2
    assert np.isfinite(samples).all()
