"""Training of an autoencoder, from a config to a page, read from top to bottom.

It shares checkpoints, batches, metrics and the mesh with the training of diffusion models
(`diffjax.loop.loop`). What differs is the step, and what is measured.
"""

import json
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, closing, nullcontext
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax import Array
from jax.sharding import Mesh
from ml_collections import ConfigDict

from diffjax.autoencoders.losses import Adversary, Reconstruction
from diffjax.autoencoders.measure import Measure
from diffjax.autoencoders.settings import check_config
from diffjax.autoencoders.step import Parts, make_step
from diffjax.codecs.autoencoders import FOLDER, latent_shape, write_autoencoder
from diffjax.compiling import jit
from diffjax.data import DataSet, all_images, batches
from diffjax.data.augment import Augmentation
from diffjax.errors import UserError
from diffjax.host.files import write_whole
from diffjax.host.interrupts import Interrupted, stop_at_once, stop_signals, stopped_at
from diffjax.host.lock import locked
from diffjax.host.prefetch import prefetched
from diffjax.host.processes import in_first, is_first, to_host, translate_lost_processes
from diffjax.host.progress import progress
from diffjax.host.run_files import read_json
from diffjax.host.storage import check_named, make_writable, translate_storage_errors
from diffjax.host.watchdog import Watchdog, watched
from diffjax.loop.logging import ProgressBar, Writer, join
from diffjax.loop.pending_metrics import MetricsWindow
from diffjax.loop.recorder import open_writers
from diffjax.optimizers.base import Optimizer
from diffjax.reports.autoencoder_page import write_autoencoder_page
from diffjax.reports.pictures import save_png
from diffjax.runs import workdirs
from diffjax.runs.checkpoints import Checkpoints, not_finite
from diffjax.spec import build, check_arguments, to_json
from diffjax.training import sharding
from diffjax.training.averages import Averages
from diffjax.training.state import TrainState

RESULT = "autoencoder.json"
"""The file of a run with what its autoencoder reaches, and the scale of its latents."""
_FEWER_IMAGES = 500  # Of the metrics in training.
_IMAGES_OF_SCALING = 10_000
_LOG = logging.getLogger("diffjax")


@dataclass(frozen=True, eq=False)
class Setup:
    """The parts of a config on a mesh, and its data.

    Attributes:
        config: resolved.
        dataset: its images.
        parts: those of its step.
        augment: how images of a batch are changed.
        mesh: the devices.
    """

    config: ConfigDict
    dataset: DataSet
    parts: Parts
    augment: Augmentation
    mesh: Mesh

    @cached_property
    def abstract(self) -> TrainState:
        """The training state as `ShapeDtypeStruct` with shardings."""
        key = jax.eval_shape(lambda: jax.random.key(0))
        return sharding.placed_shapes(jax.eval_shape(self.parts.init, key), self.mesh)

    @property
    def shardings(self) -> TrainState:
        """Where each array of the state lives."""
        return jax.tree.map(lambda leaf: leaf.sharding, self.abstract)

    def init(self, key: Array) -> TrainState:
        """A fresh state on the mesh."""
        return jax.jit(self.parts.init, out_shardings=self.shardings)(key)

    def compiled_step(self) -> Callable[..., tuple[TrainState, dict[str, Array]]]:
        """The training step for this mesh; it donates its state."""
        return jit(
            make_step(self.parts),
            mesh=self.mesh,
            donate_argnums=0,
            out_shardings=(self.shardings, sharding.replicated(self.mesh)),
        )

    def batches(self, start_step: int) -> Iterator[Array]:
        """Global batches of images from a step on; each process reads its own rows of them."""
        config, place = self.config, sharding.batch_sharding(self.mesh)
        stream = batches(
            self.dataset.train,
            batch_size=config.batch_size,
            seed=config.seed,
            start_step=start_step,
            augment=self.augment,
            part=sharding.part_of_batch(place, config.batch_size),
        )
        shape = (config.batch_size, *self.dataset.image_shape)
        for batch in stream:
            yield jax.make_array_from_process_local_data(place, batch["image"], shape)

    @cached_property
    def measure(self) -> Measure:
        """What measures the autoencoder."""
        return Measure(self.parts.autoencoder, self.config.batch_size, sharding.local_rows())


def set_up(config: ConfigDict, dataset: DataSet | None = None, mesh: Mesh | None = None) -> Setup:
    """The parts and data of a config, after all checks that training needs; nothing is compiled.

    Args:
        config: resolved.
        dataset: that of the config, if it is built already.
        mesh: the devices; by default those of `config.mesh`.

    Raises:
        UserError: the first thing that does not fit.
    """
    check_config(config)
    data: DataSet = dataset or build(config.data, DataSet, "config.data")
    if not data.codec.pixels:
        raise UserError(f"an autoencoder is trained on images, and {data.name} are latents")
    autoencoder = build(config.autoencoder, Any, "config.autoencoder")
    autoencoder.check()
    latent_shape(autoencoder, data.image_shape)
    loss = build(config.loss, Reconstruction, "config.loss")
    adversary = build(config.adversary, Adversary, "config.adversary")
    height, width, _ = data.image_shape
    loss.perceptual.check(height, width)
    if adversary.weight:
        adversary.network.check(height, width)
    mesh = mesh or sharding.make_mesh(**config.mesh)
    sharding.check_batch(config.batch_size, mesh)

    def optimizer(name: str) -> Optimizer:
        return build(config[name], Optimizer, f"config.{name}", num_steps=config.num_steps)

    parts = Parts(
        autoencoder,
        loss,
        adversary,
        optimizer("optimizer"),
        optimizer("adversary_optimizer"),
        Averages(config.ema_decays),
        data.image_shape,
    )
    augment = build(config.augment, Augmentation, "config.augment")
    return Setup(config, data, parts, augment, mesh)


def train_autoencoder(
    config: ConfigDict,
    workdir: str | Path,
    command: str = "",
    *,
    watchdog: Watchdog = Watchdog(),
) -> Path:
    """Trains the autoencoder of a config, measures it, and writes it and the run's page.

    Called again with the same config, it resumes where it stopped; the result is the same, bit for
    bit. At the end the folder `vae` has the averaged weights in the layout of diffusers, with the
    scale and the shift of the latents: the codec `autoencoder` takes the run by its folder.

    Args:
        config: resolved, as `configs/autoencoder.py` returns it.
        workdir: the run's folder.
        command: how to make the run again, for its page.
        watchdog: after how long without a step the run counts as hanging.

    Returns:
        The path of `report.html`.

    Raises:
        UserError: a config that can't work, a folder that holds another run or is being trained
            by another process, changed data.
        StorageError: the folder can't be written any more; what was saved before is whole.
        NonFiniteLoss: with the step and the last good checkpoint.
        Interrupted: Ctrl-C or SIGTERM, after saving.
    """
    check_arguments(train_autoencoder, config=config, workdir=workdir, command=command)
    check_named(workdir)
    workdir = Path(workdir)
    setup = set_up(config)
    in_first(lambda: make_writable(workdir))
    with (
        translate_lost_processes(),
        locked(workdir),
        translate_storage_errors(workdir),
        stop_signals() as should_stop,
    ):
        in_first(lambda: _claim(workdir, config))
        _LOG.info("training %s in %s", config.name, workdir)
        for note in (*setup.dataset.notes, *notes(setup)):
            _LOG.warning("%s", note)
        keep = config.checkpoints_to_keep
        with closing(Checkpoints(workdir / "checkpoints", keep)) as checkpoints:
            in_first(lambda: workdirs.check_kept(workdir, checkpoints.steps(), config))
            state = train_to_end(setup, workdir, checkpoints, should_stop, command, watchdog)
            checkpoints.wait()  # Only a state that is on disk is measured.
        stopped = f"stopped while measuring; the training in {workdir} is finished and saved"
        with (
            watched(watchdog, workdir, what="batch of the evaluation") as begun,
            stop_at_once(stopped),
            progress("measuring the autoencoder"),
        ):
            finish(setup, workdir, state, begun)
        return write_autoencoder_page(workdir) if is_first() else workdir / workdirs.REPORT


def notes(setup: Setup) -> list[str]:
    """What of the recipe is off, in lines for the log."""
    found = []
    if not setup.parts.loss.perceptual.on:
        found.append(
            "no perceptual distance: set --config.loss.perceptual.path to weights of LPIPS for one"
        )
    if not setup.parts.adversary.weight:
        found.append("no adversary: set --config.adversary.weight=0.5 for one")
    return found


def train_to_end(
    setup: Setup,
    workdir: Path,
    checkpoints: Checkpoints,
    should_stop: Callable[[], bool] = lambda: False,
    command: str = "",
    watchdog: Watchdog = Watchdog(),
) -> TrainState:
    """All steps that a run still needs.

    Returns:
        The state after the last step.

    Raises:
        UserError: the data changed since the run began.
        NonFiniteLoss: a loss, a gradient or a state is not finite.
        Interrupted: `should_stop` returned True; the state was saved.
    """
    config = setup.config
    init_key, step_key = jax.random.split(jax.random.key(config.seed))
    state, meta = _restored(setup, checkpoints) or (setup.init(init_key), {"step": 0})
    _record(setup, workdir, command, state)
    start = meta["step"]
    if start >= config.num_steps:
        _LOG.info("%s is finished: %d of %d steps", workdir, start, config.num_steps)
        return state
    kept = {
        "config": json.loads(to_json(config)),
        "data_sha256": setup.dataset.train.fingerprint(),
    }
    with ExitStack() as stack:
        images = stack.enter_context(prefetched(setup.batches(start)))
        bar = [ProgressBar(config.num_steps, start)] if is_first() else []
        writer = stack.enter_context(closing(join([*open_writers(workdir, start), *bar])))
        step_of, perceptual = setup.compiled_step(), setup.parts.loss.perceptual.params
        perceptual = jax.device_put(perceptual, sharding.replicated(setup.mesh))
        shown = _shown(setup)
        window = MetricsWindow(writer, config.batch_size, start, checkpoints.steps)
        window.restore(meta.get("unlogged", []))
        begun = stack.enter_context(watched(watchdog, workdir))
        stack.enter_context(workdirs.timed(workdir, "train_seconds"))

        def save(step: int) -> None:
            window.flush()
            if bad := not_finite(state):
                raise window.failure(f"{bad[0]} is not finite after step {step}", step)
            checkpoints.save(step, state, {**kept, "unlogged": window.unlogged()})
            window.restart_clock()

        def due(every: int, step: int) -> bool:
            return step % every == 0 or step == config.num_steps

        with progress("saving the first checkpoint"):
            save(start)  # A folder that can't hold one fails now, not after an hour.
        if should_stop():
            raise Interrupted(stopped_at(start, config.num_steps, workdir))
        for step in range(start + 1, config.num_steps + 1):
            begun(step)
            with progress("compiling the training step") if step == start + 1 else nullcontext():
                state, metrics = step_of(state, step_key, next(images), perceptual)
            window.add(metrics)
            if due(config.log_every_steps, step):
                window.close()
            stop = should_stop() and step < config.num_steps
            if due(config.sample_every_steps, step):
                window.flush()
                _show(setup, workdir, state, writer, shown)
                window.restart_clock()
            if stop or due(config.checkpoint_every_steps, step):
                save(step)
            if stop:
                raise Interrupted(stopped_at(step, config.num_steps, workdir))
    return state


def finish(
    setup: Setup, workdir: Path, state: TrainState, begun: Callable[[int], Any] = lambda n: None
) -> Mapping[str, Any]:
    """Measures the last state and writes `autoencoder.json` and the folder `vae`, unless done.

    Returns:
        The content of `autoencoder.json`.
    """
    done = read_json(workdir / RESULT) or {}
    step = int(state.step)
    if done.get("step") == step and (workdir / FOLDER / workdirs.CONFIG).is_file():
        return done
    dataset, measure = setup.dataset, setup.measure
    params = to_host(state.weights(setup.config.weights))
    scaling = measure.scaling(params, dataset.train, _IMAGES_OF_SCALING, begun)
    if not (np.isfinite(scaling.std) and scaling.std > 0):
        raise UserError(
            f"the latents in {workdir} have a standard deviation of {scaling.std:g}: this "
            "autoencoder encodes nothing; lower --config.loss.kl_weight, in another --workdir"
        )
    split = "test" if len(dataset.test) else "train"
    quality = measure.quality(params, getattr(dataset, split), begun=begun)
    result = {
        "step": step,
        "weights": setup.config.weights,
        "split": split,
        **quality._asdict(),
        "latent_shape": list(latent_shape(setup.parts.autoencoder, dataset.image_shape)),
        "latents": scaling._asdict(),
        "scale": 1.0 / scaling.std,
        "shift": scaling.mean,
    }
    if is_first():
        write_autoencoder(
            workdir / FOLDER,
            setup.parts.autoencoder,
            params,
            scale=result["scale"],
            shift=result["shift"],
        )
        write_whole(workdir / RESULT, json.dumps(result, indent=2) + "\n")
    return result


def _claim(workdir: Path, config: ConfigDict) -> None:
    """Claims a folder for a config, or checks that it is this config's."""
    saved = workdirs.saved_config(workdir)
    if saved is None:
        if (workdir / "checkpoints").exists() or (workdir / workdirs.METRICS).exists():
            raise UserError(
                f"{workdir} holds a run, but its {workdirs.CONFIG} is missing: restore it, or "
                "choose another --workdir"
            )
        write_whole(workdir / workdirs.CONFIG, to_json(config))
    elif found := workdirs.changes(saved, config):
        listed = [f"{key}: {there} there, {here} here" for key, (there, here) in found.items()]
        raise UserError(
            f"{workdir} holds a run with another config ({'; '.join(listed[:3])}"
            f"{'; …' if len(listed) > 3 else ''}): choose another --workdir"
        )
    for name in ("checkpoints", "samples"):
        make_writable(workdir / name)


def _restored(
    setup: Setup, checkpoints: Checkpoints
) -> tuple[TrainState, Mapping[str, Any]] | None:
    restored = checkpoints.restore(setup.abstract)
    if restored is None:
        return None
    state, meta = restored
    if meta["data_sha256"] != setup.dataset.train.fingerprint():
        raise UserError(
            f"the training images of {setup.dataset.name} changed since this run began: bring the "
            "old ones back, or start again in another --workdir"
        )
    _LOG.info("resuming at step %d of %d", meta["step"], setup.config.num_steps)
    return state, meta


def _record(setup: Setup, workdir: Path, command: str, state: TrainState) -> None:
    """Writes the run's machine, versions, data and command to `run.json`; keeps its time."""
    if not is_first():
        return
    before = read_json(workdir / workdirs.RUN) or {}
    content = {
        **workdirs.provenance(before, setup.mesh, command),
        "num_params": sum(leaf.size for leaf in jax.tree.leaves(state.params)),
        "data": workdirs.described(setup.dataset),
        "train_seconds": before.get("train_seconds", 0.0),
    }
    write_whole(workdir / workdirs.RUN, json.dumps(content, indent=2) + "\n")


def _shown(setup: Setup) -> np.ndarray:
    """The images of the pictures: of the test split, or of the other one if that is empty."""
    source = setup.dataset.test if len(setup.dataset.test) else setup.dataset.train
    return all_images(source, setup.config.sample_images)[0]


def _show(
    setup: Setup, workdir: Path, state: TrainState, writer: Writer, images: np.ndarray
) -> None:
    """Draws images beside their reconstructions, and measures test images."""
    step, measure = int(state.step), setup.measure
    params = to_host(state.weights(setup.config.weights))
    size = setup.config.batch_size
    found = [measure.reconstruct(params, images[i : i + size]) for i in range(0, len(images), size)]
    if len(setup.dataset.test):
        quality = measure.quality(params, setup.dataset.test, _FEWER_IMAGES)
        rate = {"eval/test/rate": quality.rate} if setup.parts.autoencoder.stochastic else {}
        writer.write(step, {"eval/test/psnr": quality.psnr, **rate})
    if is_first():
        path = workdir / "samples" / f"step_{step:08d}.png"
        save_png(path, np.concatenate(found), beside=images)
