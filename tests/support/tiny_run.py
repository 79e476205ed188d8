"""The smallest run there is: its config, its training once a session, and what is read of it."""

import fcntl
import os
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

import diffjax
from diffjax import choices, lookup
from diffjax.data import Augment, digits
from diffjax.ensemble import ensemble
from diffjax.evaluation.extractors.features import classifier_features
from diffjax.host.run_files import read_metrics
from diffjax.loop import loop, recorder
from diffjax.models.dit import DiT
from diffjax.models.low_rank import LoraLayers
from diffjax.models.unet import UNet
from diffjax.optimizers.descent import descent
from diffjax.runs import setup, workdirs
from diffjax.runs.checkpoints import Checkpoints
from diffjax.runs.load import Run
from diffjax.runs.setup import Setup
from diffjax.sampling.sample import Recipe
from diffjax.spec import spec
from diffjax.training.nonfinite import NonFinite
from diffjax.training.sharding import make_mesh
from tests.support.tiny_network import Plain, Tiny

COMMAND = "the command"
"""The command in the record of `trained_run`."""

MODELS = {
    "dit": spec(DiT, patch_size=4, hidden_size=16, depth=1, num_heads=2, dropout=0.1),
    "unet": spec(
        UNet,
        channels=8,
        channel_multipliers=(1, 2),
        num_res_blocks=1,
        attention_resolutions=(),  # the middle attends
        head_channels=8,
    ),
    "tiny": spec(Tiny),
    "plain": spec(Plain),
}


def tiny_config(arguments: str = "", /, **changes: Any) -> ConfigDict:
    """Six steps on the digits, with an evaluation of twenty images; a DiT by default."""
    config = ConfigDict(
        {
            "name": "tiny",
            "seed": 0,
            "num_steps": 6,
            "batch_size": 16,
            "accumulation_steps": 1,
            "data": spec(digits),
            "augment": spec(Augment),
            "condition_dropout": 0.1,
            "init_from": "",
            "trainable": "",
            "lora": spec(LoraLayers),
            "teacher": "ema",
            "evaluators": {},
            "trackers": {},
            "best_by": "",
            "patience_evaluations": 0,
            "optimizer": spec(descent, warmup_steps=2),
            "ema_decays": (0.9, 0.99),
            "ema_rampup_ratio": 0.0,
            "ema_lengths": (),
            "mesh": {"data": -1, "fsdp": 1, "tensor": 1, "sequence": 1},
            "sampling": spec(
                Recipe,
                solver=choices.copy(choices.SOLVERS["heun"]),
                grid=choices.copy(choices.GRIDS["uniform"]),
                num_steps=2,
                guidance_scale=2.0,
            ),
            "weights": "ema-0.99",
            "nonfinite": spec(NonFinite),
            "log_every_steps": 2,
            "snapshot_every_steps": 2,
            "sample_every_steps": 4,
            "sample_images": 64,
            "sample_prompts": (),
            "checkpoint_every_steps": 2,
            "checkpoints_to_keep": 5,
            "checkpoints_kept_every_steps": 100,
            "evaluation": {
                "extractor": spec(classifier_features, name="digits"),
                "extractors": (),
                "num_samples": 20,
                "labels": "data",
                "prompts": "",
                "batch_size": 24,
                "solvers": ("ddim",),
                "grids": (),
                "num_steps": (2,),
                "guidance_scales": (),
                "weights": (),
                "seeds": (),
                "seed": 0,
                "likelihood": (),
            },
        }
    )
    lookup.set_axes(config, arguments, MODELS, model="dit")
    config.update_from_flattened_dict(changes)
    return config.lock()


def trained_config(**changes: Any) -> ConfigDict:
    """What `trained_run` is trained by: the smallest network, and a solver that asks it once."""
    config = tiny_config("model=tiny", **changes)
    config.unlock()
    config.sampling.solver = choices.copy(choices.SOLVERS["euler"])
    return config.lock()


def loaded(workdir: Path, **how: Any) -> Run:
    return diffjax.load(workdir, allowed_packages=("diffjax", "tests"), **how)


def once_a_session(
    factory: pytest.TempPathFactory, name: str, train: Callable[[Path], object]
) -> Path:
    """The folder of a run, trained by whichever worker needs it first, for all workers."""
    top = factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        top = top.parent  # which all workers of a session have, and no other session
    folder, done = top / name, top / f"{name}.done"
    with open(top / f"{name}.lock", "w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        if not done.exists():
            train(folder)
            done.touch()
    return folder


def of_noise(given: Setup, workdir: Path = Path("nowhere")) -> Run:
    """A run that is not trained, but whose weights are noise: no part of the network is silent."""
    state, rng = given.init(jax.random.key(0)), np.random.default_rng(1)

    def noisy(leaf: jax.Array) -> jax.Array:
        moved = np.asarray(leaf) + 0.1 * rng.normal(size=leaf.shape)
        return jax.device_put(moved.astype(leaf.dtype), leaf.sharding)

    state = state._replace(ema=jax.tree.map(noisy, state.ema))
    return Run(given.parts, state, workdir, tuple("0123456789"))


def leave(run: Run, workdir: Path) -> None:
    """Makes the folder that training would have made, at step 0."""
    workdir.mkdir()
    workdirs.claim(workdir, run.config)
    workdirs.record_run(workdir, run.parts, digits(), "")
    with closing(Checkpoints(workdir / "checkpoints", 1, 1)) as store:
        store.save(0, run.state, {})


def one_device() -> jax.sharding.Mesh:
    """The mesh of what is no test of meshes: XLA takes three times as long to compile for eight."""
    return make_mesh(devices=jax.devices()[:1])


def on_one_device(patch: pytest.MonkeyPatch) -> None:
    """Trainings take one device, whose programs XLA need not split: `trained_run` has all eight."""
    for module in (setup, workdirs):
        patch.setattr(module, "make_mesh", lambda **_: one_device())


def without_pictures(patch: pytest.MonkeyPatch) -> None:
    """A training makes its steps, checkpoints and lines; no samples, no evaluation and no page."""
    patch.setattr(recorder, "grid_drawer", lambda *_: lambda state: None)
    for module in (loop, ensemble):
        patch.setattr(module, "evaluate_once", lambda *_: None)
        patch.setattr(module, "page", lambda workdir: workdir / workdirs.REPORT)


def arrays_of(workdir: Path) -> Any:
    return jax.device_get(loaded(workdir, mesh=one_device()).state._asdict())


def assert_same(one: Any, other: Any, **tolerance: float) -> None:
    """Array by array; the message names the one that differs."""
    for (path, a), b in zip(
        jax.tree_util.tree_leaves_with_path(one), jax.tree.leaves(other), strict=True
    ):
        np.testing.assert_allclose(a, b, err_msg=jax.tree_util.keystr(path), **tolerance)


def logged(workdir: Path) -> list[dict[str, Any]]:
    """The metrics without what depends on the clock."""
    records = read_metrics(workdir / "metrics.jsonl")
    return [{k: v for k, v in r.items() if k != "images_per_second"} for r in records]
