"""Samplers that left the project: the same images, from a file that JAX alone runs."""

import functools
import os
import re
import subprocess
import sys
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from jax import export

from diffjax.conditions import of_classes
from diffjax.errors import UserError
from diffjax.exchange.portable import portable_model, portable_sampler
from diffjax.runs.load import Run
from diffjax.runs.samples.model import Request
from diffjax.runs.setup import set_up
from diffjax.sampling import solvers
from diffjax.sampling.export import PLATFORMS, check_export_size, serialise
from diffjax.sampling.restart import restart
from diffjax.training.sharding import SPREAD
from experiments import export as program
from experiments.flags import cli
from tests.support.tiny_run import leave, of_noise, one_device, tiny_config

SHAPE = (8, 8, 1)
PAGE = Path(__file__).parents[2] / "docs" / "export.md"


@cache
@functools.cache
def run_of(arguments: str = "") -> Run:
    """To be read: tests share it and its programs."""
    return of_noise(set_up(tiny_config(arguments), SHAPE, of_classes(10), one_device()))


def exported(run: Run, **how: Any) -> export.Exported:
    source = SHAPE if run.parts.wired.objective.traits.starts_at_source else None
    noise, platforms = how.get("noise", False), how.pop("platforms", PLATFORMS)
    sampler = portable_sampler(portable_model(run), run.recipe, **how)
    code = serialise(
        sampler, SHAPE, of_classes(10), source=source, noise=noise, platforms=platforms
    )
    return export.deserialize(bytearray(code))


@pytest.mark.parametrize(
    "arguments",
    [
        "model=tiny,coupling=translation",
        pytest.param("model=unet", marks=pytest.mark.thorough),  # a DiT is below
    ],
)
def test_a_file_draws_what_the_run_does(arguments):
    """The run's own recipe, guided; any number of labels; each image by its number alone."""
    run = run_of(arguments)
    assert run.recipe.guidance_scale == 2.0
    sampler = exported(run)
    assert sampler.platforms == ("cpu", "cuda", "tpu")
    for n, seed in ((5, 3), (2, 4)):
        labels = np.arange(n, dtype=np.int32) * 3 % 10
        rng = np.random.default_rng(0)
        source = rng.uniform(-1, 1, (n, *SHAPE)).astype(np.float32)
        sources = (source,) if run.parts.wired.objective.traits.starts_at_source else ()
        expected = run.sample(labels, seed=seed, source=sources[0] if sources else None)
        assert expected.std() > 0.1
        images = sampler.call(np.uint32(seed), labels, *sources)
        np.testing.assert_allclose(images, expected, atol=2e-5)


@pytest.mark.thorough(tenth=False)
def test_a_run_whose_state_is_spread_over_devices_leaves_a_file_for_one():
    config = tiny_config("model=tiny", sharding_rules=SPREAD)
    run = of_noise(set_up(config, SHAPE, of_classes(10)))
    assert run.parts.mesh.size > 1
    assert exported(run, platforms=["cpu"]).nr_devices == 1


@pytest.mark.thorough(tenth=False)
def test_noise_in_place_of_a_seed():
    run = run_of("model=tiny")
    labels = np.arange(4, dtype=np.int32)
    noise = Request(labels, 7).noise(SHAPE)
    images = exported(run, noise=True, platforms=["cpu"]).call(noise, labels)
    np.testing.assert_allclose(images, run.sample(labels, seed=7), atol=2e-5)


def test_live_weights_and_a_solver_whose_route_goes_back_up():
    run, again = run_of("model=tiny"), restart(solvers.ddpm())
    run = replace(run, arrays=run.state._replace(params=run.state.ema["ema-0.9"]))
    recipe = replace(run.recipe, solver=again, num_steps=3, guidance_scale=1.0)
    sampler = portable_sampler(portable_model(run, "live"), recipe)
    code = serialise(sampler, SHAPE, of_classes(10), platforms=["cpu"])
    labels = np.arange(3, dtype=np.int32)
    expected = run.sample(
        labels, seed=1, weights="live", solver=again, num_steps=3, guidance_scale=1.0
    )
    images = export.deserialize(bytearray(code)).call(np.uint32(1), labels)
    np.testing.assert_allclose(images, expected, rtol=2e-6, atol=2e-5)
    assert run.model("live").lower(recipe, 8).as_text()  # what plans compile


@pytest.mark.thorough(tenth=False)
@pytest.mark.parametrize(
    "arguments", ["model=tiny", pytest.param("", marks=pytest.mark.thorough)], ids=["tiny", "dit"]
)
def test_weights_in_half_the_bytes(arguments):
    """They are rounded and nothing else: the network computes in float32 on what is left."""
    run = run_of(arguments)
    model, round_ = portable_model(run), program.in_type("bfloat16")
    rounded = jax.tree.map(lambda x: round_(x).astype(np.float32), run.state.ema)
    code = serialise(
        portable_sampler(model.map(round_), run.recipe), SHAPE, of_classes(10), platforms=["cpu"]
    )
    if not arguments:  # so many weights that the rest of the file does not matter
        num_params = run.parts.wired.num_params
        whole = serialise(
            portable_sampler(model, run.recipe), SHAPE, of_classes(10), platforms=["cpu"]
        )
        assert len(whole) - len(code) == pytest.approx(2 * num_params, rel=0.1)
    labels = np.arange(4, dtype=np.int32)
    images = export.deserialize(bytearray(code)).call(np.uint32(5), labels)
    expected = replace(run, arrays=run.state._replace(ema=rounded)).sample(labels, seed=5)
    exact = run.sample(labels, seed=5)
    size = np.abs(exact).max()  # hundreds, from the smallest network
    np.testing.assert_allclose(images, expected, rtol=0, atol=2e-5 * max(1.0, size))
    assert 1e-4 < np.abs(images - exact).max() / size < 0.1


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """The folder of such a run, as training leaves it."""
    folder = tmp_path_factory.mktemp("export") / "run"
    leave(run_of("model=tiny"), folder)
    return folder


@pytest.mark.process
def test_the_page_s_lines_run_without_the_project(workdir, tmp_path, capsys):
    out = tmp_path / "sampler.bin"
    argv = [f"--workdir={workdir}", f"--out={out}", "--allowed_packages=tests"]
    assert cli.run(program.main, program.FLAGS, usage="", argv=argv) == 0
    said = capsys.readouterr().out
    assert "call(seed uint32[], labels int32[b]) -> float32[b, 8, 8, 1] on cpu, cuda, tpu" in said
    (lines,) = re.findall(r"```py\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert len(lines.splitlines()) <= 10
    code = f"import sys\nsys.modules['diffjax'] = None\n{lines}\nnp.save('images.npy', images)\n"
    environment = {**os.environ, "XLA_FLAGS": ""}
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, check=True)
    expected = run_of("model=tiny").sample(np.arange(16) % 10, seed=0)
    np.testing.assert_allclose(np.load(tmp_path / "images.npy"), expected, rtol=1e-5)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--out=none/x.bin"], "there is no folder none"),
        (["--out=x.bin", "--solver=ddpm", "--input=noise"], "draws noise at every step"),
        (["--out=x.bin", "--platforms=cpu,gpu"], "no platform 'gpu' to export to"),
        (["--out=x.bin", "--platforms="], "--platforms= is empty: choose from cpu,cuda,tpu"),
        (["--out=x.bin", "--weights=ema-0.5"], "no weights 'ema-0.5'"),
        ([], "--out is missing"),
    ],
)
def test_mistakes_are_one_line(workdir, flags, said, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    argv = [f"--workdir={workdir}", "--allowed_packages=tests", *flags]
    assert cli.run(program.main, program.FLAGS, usage="", argv=argv) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ")
    assert said in error
    assert not list(tmp_path.iterdir())


def test_what_a_file_cannot_hold():
    with pytest.raises(UserError, match=r"the weights are 3\.0 GB"):
        check_export_size({"w": jax.ShapeDtypeStruct((3 * 2**28,), np.float32)})

    def host(noise, labels):
        return jax.pure_callback(lambda x: x, jax.ShapeDtypeStruct(noise.shape, noise.dtype), noise)

    with pytest.raises(UserError, match="can't be exported to cpu, cuda, tpu: "):
        serialise(host, SHAPE, of_classes(10), noise=True)


def test_without_flatbuffers(monkeypatch):
    monkeypatch.setitem(sys.modules, "flatbuffers", None)
    with pytest.raises(UserError, match=r"pip install 'diffjax\[export\]'"):
        serialise(lambda noise, labels: noise, SHAPE, of_classes(10), noise=True)
