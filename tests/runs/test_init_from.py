"""A fresh run begins with given weights: those of a run, of an average, of a file."""

import json
import logging
import shutil
import struct
from dataclasses import replace

import jax
import numpy as np
import pytest

from diffjax.conditions import Classes
from diffjax.errors import UserError
from diffjax.loop import loop
from diffjax.models.dit.network import DiT
from diffjax.models.dit.published import DIFFUSERS
from diffjax.models.dit.published import FAMILY as DIT
from diffjax.pretrained.files import read_state_dict, write_safetensors
from diffjax.pretrained.folders import write_folder
from diffjax.runs.checkpoints import Checkpoints
from diffjax.runs.initial import by_path, find_initial_weights, weights_sha256
from diffjax.runs.setup import Setup, set_up
from diffjax.spec import spec
from diffjax.training.state import LIVE
from tests.support.shared_parts import shared_parts
from tests.support.tiny_run import loaded, on_one_device, trained_config, without_pictures


def checkpoint(workdir, step, setup):
    store = Checkpoints(workdir / "checkpoints", read_only=True)
    state, _ = store.read(step, setup.abstract)
    store.close()
    return state


def safetensors(path, arrays):
    """The format: the header's length, a JSON header, the arrays one after the other."""
    header, content = {}, b""
    for name, array in arrays.items():
        span = [len(content), len(content) + array.nbytes]
        header[name] = {"dtype": "F32", "shape": list(array.shape), "data_offsets": span}
        content += array.tobytes()
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + content)
    return path


def files_of(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


@pytest.fixture
def like(loaded_run):
    return Setup.of(loaded_run.parts).abstract.weights(LIVE)


def test_live_and_all_averages_begin_with_the_weights_and_all_else_is_fresh(
    trained_run, tmp_path, monkeypatch, caplog
):
    without_pictures(monkeypatch)
    on_one_device(monkeypatch)
    shared_parts(monkeypatch)
    source = shutil.copytree(trained_run, tmp_path / "source")
    weights = loaded(source).weights("ema-0.9")
    config = trained_config(init_from=f"{source}:ema-0.9", num_steps=2)
    workdir = tmp_path / "run"
    loop.train(config, workdir)
    setup = set_up(config, (8, 8, 1), Classes(10))
    first = checkpoint(workdir, 0, setup)
    for name in (LIVE, "ema-0.9", "ema-0.99"):
        jax.tree.map(np.testing.assert_array_equal, first.weights(name), weights)
    assert int(first.step) == 0
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(first.opt_state))
    noted = json.loads((workdir / "run.json").read_text())["init_from"]
    sha256 = weights_sha256(weights)
    assert noted == {"folder": str(source), "weights": "ema-0.9", "step": 6, "sha256": sha256}

    # The same command again reads the source no more, and forgets nothing of it.
    shutil.rmtree(source)
    with pytest.raises(UserError, match=r"another config \(num_steps: 2 there, 4 here\)"):
        loop.train(trained_config(init_from=config.init_from, num_steps=4), workdir)
    caplog.set_level(logging.INFO, "diffjax")
    loop.train(config, workdir)
    assert "resuming at step 2 of 2" in caplog.text
    assert json.loads((workdir / "run.json").read_text())["init_from"] == noted


@pytest.mark.thorough
def test_the_page_says_what_a_run_began_with(copy_of_run):
    run = json.loads((copy_of_run / "run.json").read_text())
    source = {"folder": "runs/older", "weights": "live", "step": 1200, "sha256": "0123456789"}
    (copy_of_run / "run.json").write_text(json.dumps({**run, "init_from": source}))
    text = loop.page(copy_of_run).read_text()
    assert "runs/older, weights live, step 1,200, SHA-256 01234567" in text


def test_a_folder_alone_means_the_weights_that_it_is_evaluated_with(trained_run, loaded_run, like):
    params, source = find_initial_weights(str(trained_run), like)()
    assert source["weights"] == "ema-0.99"
    jax.tree.map(np.testing.assert_array_equal, params, loaded_run.weights())


@pytest.mark.parametrize("joined", [".", "/"])
def test_a_file_with_the_networks_own_names_and_shapes(
    trained_run, loaded_run, tmp_path, like, joined
):
    weights = loaded_run.weights(LIVE)
    arrays = {
        name.replace("/", joined): np.asarray(leaf) for name, leaf in by_path(weights).items()
    }
    path = safetensors(tmp_path / "published.safetensors", arrays)
    params, source = find_initial_weights(str(path), like)()
    jax.tree.map(np.testing.assert_array_equal, params, weights)
    assert source == {"file": str(path), "sha256": weights_sha256(weights)}
    # Equal weights are equal wherever they come from.
    assert find_initial_weights(f"{trained_run}:live", like)()[1]["sha256"] == source["sha256"]


@pytest.mark.parametrize(
    "scan", [pytest.param(False, marks=pytest.mark.thorough(tenth=False)), True]
)
def test_a_file_with_the_names_of_the_authors(tmp_path, scan):
    """Of DiT, and of diffusers' DiT; a network of another width is refused."""

    def set_up_dit(width):
        config = trained_config()
        config.model = spec(DiT, hidden_size=width, depth=2, num_heads=2, scan=scan)
        setup = set_up(config, (8, 8, 1), Classes(10))
        return setup, setup.abstract.weights(LIVE)

    setup, like = set_up_dit(16)
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: rng.random(leaf.shape, np.float32), like)
    path = tmp_path / "published.safetensors"
    write_safetensors(path, DIT.to_theirs(params, setup.parts.denoiser))
    assert "blocks.1.attn.qkv.weight" in read_state_dict(path)
    found, source = find_initial_weights(str(path), like, denoiser=setup.parts.denoiser)()
    jax.tree.map(np.testing.assert_array_equal, found, params)
    assert source == {"file": str(path), "sha256": weights_sha256(params)}
    folder = tmp_path / "diffusers"
    write_folder(folder, DIFFUSERS.to_theirs(params, setup.parts.denoiser), {})
    found, source = find_initial_weights(str(folder), like, denoiser=setup.parts.denoiser)()
    jax.tree.map(np.testing.assert_array_equal, found, params)
    assert source == {"file": str(folder), "sha256": weights_sha256(params)}
    setup, like = set_up_dit(24)
    with pytest.raises(
        UserError, match=r"^config.init_from=.* is of another network: pos_embed is"
    ):
        find_initial_weights(str(path), like, denoiser=setup.parts.denoiser)


def test_a_learned_variance_is_left_out_where_the_network_has_none(tmp_path):
    """The first channels of each pixel of the output, by NumPy, and it is recorded."""
    config = trained_config()
    config.model = spec(DiT, hidden_size=16, depth=1, num_heads=2, scan=True)
    parts = set_up(config, (8, 8, 3), Classes(10)).parts
    denoiser, like = parts.denoiser, parts.abstract.weights(LIVE)
    twice = replace(denoiser, network=denoiser.network.clone(out_channels=6))
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: rng.random(leaf.shape, np.float32), DIT.shapes(twice))
    path = tmp_path / "published.safetensors"
    write_safetensors(path, DIT.to_theirs(params, twice))
    found, source = find_initial_weights(str(path), like, denoiser=denoiser)()
    assert source["left_out"] == "learned variance"
    for name, leaf in params["final_out"].items():
        pixels = leaf.reshape(*leaf.shape[:-1], 4, 6)[..., :3]  # patches of 2x2
        expected = pixels.reshape(*leaf.shape[:-1], 12)
        np.testing.assert_array_equal(found["final_out"][name], expected)
    np.testing.assert_array_equal(
        found["patch_embedding"]["kernel"], params["patch_embedding"]["kernel"]
    )


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (
            {"conv_in.bias": np.zeros(7, np.float32)},
            r"conv_in/bias is \[7\] there and \[16\] in this network",
        ),
        ({"conv_in.bias": None}, r"has no parameter conv_in/bias \[16\]"),
        (
            {"conv_in.scale": np.zeros(3, np.float32)},
            r"has a parameter conv_in/scale \[3\], which this network has not; did you mean",
        ),
    ],
)
def test_weights_of_another_network_are_refused_before_anything_is_written(
    loaded_run, tmp_path, change, says
):
    weights = by_path(loaded_run.weights(LIVE))
    arrays = {name.replace("/", "."): np.asarray(leaf) for name, leaf in weights.items()} | change
    arrays = {name: array for name, array in arrays.items() if array is not None}
    path = safetensors(tmp_path / "other.safetensors", arrays)
    before = files_of(tmp_path)
    with pytest.raises(UserError, match=says):
        loop.train(trained_config(init_from=str(path)), tmp_path / "run")
    assert files_of(tmp_path) == before


def test_weights_of_whole_numbers_are_refused(loaded_run, tmp_path, like):
    weights = {name: np.asarray(x) for name, x in by_path(loaded_run.weights(LIVE)).items()}
    weights["conv_in/bias"] = weights["conv_in/bias"].astype(np.int8)
    path = tmp_path / "quantised.safetensors"
    write_safetensors(path, weights)
    with pytest.raises(UserError, match="conv_in/bias has the type int8, and weights are floats"):
        find_initial_weights(str(path), like)


def test_weights_that_are_not_finite_are_named(loaded_run, tmp_path):
    weights = {name: np.array(x) for name, x in by_path(loaded_run.weights(LIVE)).items()}
    weights["conv_in/bias"][0] = np.nan
    write_safetensors(tmp_path / "x.safetensors", weights)
    config = trained_config()
    with config.unlocked():
        config.init_from = str(tmp_path / "x.safetensors")
    with pytest.raises(
        UserError,
        match=r"config\.init_from=.*safetensors: conv_in/bias has 1 NaN or infinity among its 16",
    ):
        loop.train(config, tmp_path / "run")


def test_a_run_of_another_network_is_refused_by_the_first_parameter_that_differs(
    trained_run, tmp_path
):
    config = trained_config()
    with config.unlocked():
        config.model = {"_target_": "tests.support.tiny_network:Plain"}
        config.init_from = str(trained_run)
    with pytest.raises(UserError, match=r"has no parameter Dense_0/bias \[16\]"):
        loop.train(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("named", "says"),
    [
        ("{run}:ema-0.95", r"no weights 'ema-0\.95'; did you mean 'ema-0\.9"),
        ("{run}/nowhere", "is neither a file nor the folder of a run"),
        ("nowhere:live", "is neither a file nor the folder of a run"),
    ],
)
def test_weights_that_there_are_not_are_refused(trained_run, like, named, says):
    with pytest.raises(UserError, match=says):
        find_initial_weights(named.format(run=trained_run), like)


def test_weights_are_read_into_the_shardings_of_a_mesh(trained_run, loaded_run, tmp_path):
    """Over `fsdp` and `tensor`, from a run of one device and from a file."""
    config = trained_config()
    with config.unlocked():
        config.mesh.update(data=1, fsdp=4, tensor=2)
    setup = set_up(config, (8, 8, 1), Classes(10))
    weights = loaded_run.weights(LIVE)
    arrays = {name: np.asarray(leaf) for name, leaf in by_path(weights).items()}
    path = safetensors(tmp_path / "published.safetensors", arrays)
    like = setup.abstract.weights(LIVE)
    digests = set()
    for named in (f"{trained_run}:live", str(path)):
        params, source = find_initial_weights(named, like)()
        digests.add(source["sha256"])
        state = setup.begin(params)
        assert jax.tree.map(lambda leaf: leaf.sharding, state) == setup.shardings
        assert not state.params["embed"]["embedding"].sharding.is_fully_replicated
        for name in (LIVE, "ema-0.9", "ema-0.99"):
            jax.tree.map(np.testing.assert_array_equal, state.weights(name), weights)
    assert len(digests) == 1, "the digest does not depend on the mesh"
