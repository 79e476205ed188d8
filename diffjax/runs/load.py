"""Loads a trained run from its folder, for any solver or metric."""

from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, field, replace
from functools import cache, cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from diffjax.data import DataSet
from diffjax.errors import UserError
from diffjax.host.progress import progress
from diffjax.host.run_files import metrics_arrays, read_metrics
from diffjax.pretrained.lora import Lora
from diffjax.runs import workdirs
from diffjax.runs.averages import is_reconstructed, read_reconstructed
from diffjax.runs.checkpoints import Checkpoints, Damaged
from diffjax.runs.parts import Parts
from diffjax.runs.samples.drawing import draw_images, one_condition
from diffjax.runs.samples.model import Model
from diffjax.runs.samples.recipes import Chosen, with_found_grid
from diffjax.runs.setup import Setup
from diffjax.sampling.grids import Grid
from diffjax.sampling.guidance import Rule
from diffjax.sampling.sample import Recipe
from diffjax.sampling.solvers import Solver
from diffjax.spec import check_arguments
from diffjax.training.averages import Averages
from diffjax.training.sharding import AXES
from diffjax.training.state import LIVE, TrainState
from diffjax.training.subset import merged

if TYPE_CHECKING:
    from diffjax.runs.samples.edits import Edited

BEST = "best"
"""The folder of a run's best checkpoint by `config.best_by`, and its name for `load`."""


class Arrays(Protocol):
    """The arrays of a run, which are read when they are used."""

    @property
    def step(self) -> int:
        """Training steps made."""
        ...

    def weights(self, name: str) -> Any:
        """Parameters by name: `live`, or that of an average."""
        ...

    def read(self, abstract: TrainState) -> TrainState:
        """The state with its arrays read, except those that are `...` in `abstract`."""
        ...


@dataclass(frozen=True, eq=False)
class Saved:
    """A checkpoint whose arrays are read and verified at their first use.

    Attributes:
        folder: the folder of the run's checkpoints.
        step: the step of this checkpoint.
        abstract: its weights as `ShapeDtypeStruct` with shardings (`Parts.abstract`).
        known: the weights that were read already, by name.
    """

    folder: Path
    step: int
    abstract: TrainState = field(repr=False)
    known: dict[str, Any] = field(repr=False)

    def weights(self, name: str) -> Any:
        """Live or averaged parameters by name, or an average made after training; read once.

        Raises:
            UserError: the run keeps no average of that name, or it is damaged.
        """
        if name not in self.known and is_reconstructed(name, [*self.abstract.ema]):
            workdir, params = self.folder.parent, self.abstract.params
            average = read_reconstructed(workdir, name, self.step, params)
            self.known[name] = merged(average, self.read(self.abstract.only(None)).frozen)
        if name not in self.known:
            self.known[name] = self.read(self.abstract.only(name)).weights(name)
        return self.known[name]

    def read(self, abstract: TrainState) -> TrainState:
        """The state with its arrays read, except those that are `...`; each call reads them again.

        Raises:
            UserError: the checkpoint is damaged, or was deleted.
        """
        with closing(Checkpoints(self.folder, read_only=True)) as checkpoints:
            if self.step not in checkpoints.steps():
                raise UserError(
                    f"checkpoint {self.step} in {self.folder} was deleted: load the run again"
                )
            try:
                return checkpoints.read(self.step, abstract)[0]
            except Damaged as error:
                raise UserError(
                    f"{error}; move {self.folder / str(self.step)} away, and load the run again: "
                    "it is then that of the checkpoint before"
                ) from error


@dataclass(frozen=True, repr=False)
class Run:
    """A trained run at one of its steps.

    Attributes:
        parts: the parts of its config, such as `run.parts.wired.path`.
        arrays: its state in memory, or what reads it, such as `Saved` from a checkpoint.
        workdir: the folder of the run.
        others: `(folder, weights) -> Run`, which reads the weaker models of guidance once.
        loras: the LoRA files that were added to its weights.
    """

    parts: Parts
    arrays: TrainState | Arrays
    workdir: Path
    others: Callable[[str, str | None], "Run"] = field(default_factory=lambda: _reader())
    loras: tuple[Lora, ...] = ()

    trained_here: ClassVar[bool] = True
    """Whether diffjax trained it; false of a published network."""

    @property
    def config(self) -> ConfigDict:
        """The resolved config."""
        return self.parts.config

    @property
    def step(self) -> int:
        """Training steps made."""
        return int(self.arrays.step)

    @property
    def steps(self) -> list[int]:
        """The steps that have a checkpoint in its folder, in increasing order."""
        return sorted(workdirs.checkpoint_steps(self.workdir))

    def at(self, step: int | str) -> "Run":
        """The same run at another of its checkpoints; it shares the compiled programs.

            for step in run.steps:
                images = run.at(step).sample(16)

        Args:
            step: the number of a step, or "best", as in `load`.

        Raises:
            UserError: there is no such checkpoint, or the run was not loaded from one.
        """
        check_arguments(Run.at, step=step)
        if not isinstance(self.arrays, Saved):
            raise UserError(f"{self.workdir} has no checkpoints: only a run that was loaded has")
        workdir = self.arrays.folder.parent
        nothing = self.parts.abstract.only(None)
        folder = _folder_of(workdir, step)
        _, meta = _restored(folder, step, nothing)
        return replace(self, arrays=Saved(folder, meta["step"], self.parts.abstract, {}))

    @cached_property
    def state(self) -> TrainState:
        """All arrays with the optimizer's state: several times the memory that sampling needs."""
        if isinstance(self.arrays, TrainState):
            return self.arrays
        return self.arrays.read(Setup.of(self.parts).abstract)

    def merged(self, name: str | None = None) -> Any:
        """The parameters with LoRA merged into the kernels, for the network without LoRA.

        Raises:
            UserError: the run has no weights of that name.
        """
        return self.parts.wired.lora.merged(self.weights(name))

    @property
    def recipe(self) -> Recipe:
        """Solver, grid, steps and guidance of the config; change it with `dataclasses.replace`."""
        return self.parts.wired.recipe

    def weights(self, name: str | None = None) -> Any:
        """Parameters by name (`live`, `ema-0.999`, `power-0.07`); by default `config.weights`.

        Raises:
            UserError: the run keeps none of that name.
        """
        check_arguments(Run.weights, name=name)
        return self.arrays.weights(name or self.config.weights)

    def model(self, weights: str | None = None) -> Model:
        """The model with the weights of that name, as in `weights`; one object for each name.

        Raises:
            UserError: the run keeps none of that name.
        """
        check_arguments(Run.model, weights=weights)
        return self._models(weights or self.config.weights)

    @cached_property
    def _models(self) -> Callable[[str], Model]:
        programs = self.parts.programs
        return cache(lambda name: Model(programs, self.weights(name), find=self._find))

    def _find(self, name: str) -> Model:
        run, weights = self.called(name)
        return run.model(weights)

    def called(self, name: str) -> "tuple[Run, str | None]":
        """The run and the weights that a name of guidance refers to (`Model.find`).

        Args:
            name: weights of this run (`live`, `ema-0.999`), the folder of another run, or
                `FOLDER:weights`.

        Raises:
            UserError: there are no such weights, or their model is for other images or another
                path.
        """
        own = [LIVE, *Averages.of(self.config).names]
        if name in own:
            return self, name
        folder, _, average = name.partition(":")
        if not Path(folder).exists():
            raise UserError(
                f"guidance against weights {name!r}: neither of this run's ({', '.join(own)}) nor "
                "the folder of a run or a published file"
            )
        other = self.others(folder, average or None)
        wired, theirs = self.parts.wired, other.parts.wired
        for what, here, there in (
            ("path", wired.path, theirs.path),
            ("image shape", wired.image_shape, theirs.image_shape),
            ("condition", wired.condition, theirs.condition),
            ("codec", self.parts.codec.latents, other.parts.codec.latents),
        ):
            if here != there:
                raise UserError(
                    f"{folder} can't guide this run: its {what} is {there}, this run's is {here}"
                )
        return other, None

    def sample(
        self,
        condition: Any = None,
        *,
        labels: Any = None,
        prompts: Any = None,
        num_samples: int | None = None,
        source: np.ndarray | None = None,
        seed: int = 0,
        solver: str | Solver | None = None,
        grid: str | Grid | None = None,
        num_steps: int | None = None,
        guidance_scale: float | None = None,
        guidance: str | Rule | None = None,
        against: Any = None,
        negative: str | None = None,
        weights: str | None = None,
        seamless: bool | str = False,
        batch_size: int = 256,
    ) -> np.ndarray:
        """Draws one image for each row of a condition; None keeps a setting of the run's config.

            run.sample(16, solver="dpmpp_2m", grid="karras", guidance="cfg+limited")

        Image i depends on the seed, on i, its condition and its source alone. Name
        solver, grid and guidance as the flags of `experiments.sample` do (rows of
        `diffjax.choices`), or pass values, as `diffjax.sampling.solvers.heun()`.

        Args:
            condition: the condition of each sample: a list that the run's condition parses (labels
                by number or name, or prompts; for several parts, a dict or a text for each
                sample), or arrays with one row for each sample. A text is one sample. A number n
                is n samples whose labels cycle through all classes.
            labels: another name of `condition`, that of the flag.
            prompts: another name of `condition`, that of the flag.
            num_samples: the number of samples; the rows of the condition are used in turn.
            source: `[n, H, W, C]` in [-1, 1], the source images, for runs between two data sets. A
                codec encodes them.
            seed: the seed of the noise, an integer between -2³¹ and 2³¹.
            solver: the rule of a step.
            grid: the times of the steps; "found" is the grid that `experiments.find_grid` found.
            num_steps: intervals of the grid, from 1.
            guidance_scale: 1 is off.
            guidance: how two predictions are combined, as "cfg+limited".
            against: the source of the second prediction: a text such as "label:3", "prompt:TEXT" or
                "weights:ema-0.99"; a value of `diffjax.sampling.guidance`; or a negative condition,
                a list or arrays as `condition`, with one row for all samples or one for each.
            negative: a negative prompt for all samples; short for `against=[negative]`.
            weights: `live` or the name of an average.
            seamless: whether the sides of an image continue at the opposite sides, so that it tiles
                a plane: True for both axes, or "x" (left to right) or "y".
            batch_size: images at a time.

        Returns:
            `[n, H, W, C]` float32, nominally in [-1, 1]: decoded images.

        Raises:
            UserError: there is no such condition, name or weights; a number is out of range; or the
                recipe does not suit this model (`check_recipe`).
        """
        if negative is not None:
            if against is not None:
                raise UserError("negative= and against= are both what guidance leads away from")
            against = [negative]
        chosen = Chosen(solver, grid, num_steps, guidance_scale, guidance, against)
        named = {"condition": condition, "labels": labels, "prompts": prompts}
        return draw_images(
            self.model(weights).seamless(seamless),
            one_condition(self.parts.wired.condition, named, num_samples),
            with_found_grid(self, chosen),
            source=source,
            seed=seed,
            batch_size=batch_size,
        )

    def edit(
        self,
        images: Any = None,
        condition: Any = None,
        *,
        task: str = "vary",
        mask: Any = None,
        labels: Any = None,
        prompts: Any = None,
        strength: float | None = None,
        method: str | None = None,
        factor: int = 2,
        blur: float = 1.0,
        jump: int = 5,
        times: int = 3,
        num_images: int = 10,
        solver: str | Solver | None = None,
        grid: str | Grid | None = None,
        num_steps: int | None = None,
        guidance_scale: float | None = None,
        guidance: str | Rule | None = None,
        against: Any = None,
        seed: int = 0,
        weights: str | None = None,
        data_path: str | None = None,
    ) -> "Edited":
        """Edits images as `experiments.edit` does; arguments are its flags.

            made = run.edit("photo.png", labels=3, task="inpaint", mask="mask.png")
            made.images

        Args:
            images: files by their names, or `[n, H, W, C]` in [-1, 1], or uint8 from 0 to 255, in
                the size of samples; for `outpaint` they may be smaller. None are `num_images` of
                the test set with their conditions.
            condition: what each image is to show, as in `sample`; one or one for each.
            task: `vary`, `inpaint`, `outpaint`, `upscale`, `deblur`, `colour` or `invert`.
            mask: the region that `inpaint` generates: the white part of an image file, or the
                pixels above 0 of `[H, W]`. By default the lower half.
            labels: the same as `condition`, by the name of the flag.
            prompts: as `labels`.
            strength: share of the solver's steps in (0, 1]; of `vary` 0.6, else 1.
            method: `pseudoinverse` or `posterior`; of `inpaint` and `outpaint` `replace`,
                `repaint` and `fixed_noise` as well.
            factor: the factor of `upscale`.
            blur: the blur of `deblur`, in pixels.
            jump: the number of steps that `repaint` repeats.
            times: the number of repeats in `repaint`.
            num_images: the number of test images.
            solver: the rule of a step, as in `sample`; so are the next five.
            grid: the times of the steps.
            num_steps: by default 20, or what a published network has.
            guidance_scale: by default 1 (off), or what a published network has.
            guidance: how two predictions are combined.
            against: the source of the second of them, a text or a value.
            seed: the seed of the noise.
            weights: `live` or the name of an average.
            data_path: where the data lie now, if they have moved.

        Returns:
            `images` (the results), `original`, `observed` and `anew`, and their `difference`.

        Raises:
            UserError: what the command refuses.
        """
        from diffjax.runs.samples import edits

        named = {"condition": condition, "labels": labels, "prompts": prompts}
        how = edits.How(task, strength, method, factor, blur, jump, times)
        model = self.model(weights)
        images, mask = edits.images_in(model, images, task), edits.mask_in(model, mask)
        return edits.edit_images(
            self,
            edits.Originals(images, edits.shown(self, images, named), mask, num_images, data_path),
            how,
            Chosen(solver, grid, num_steps, guidance_scale, guidance, against),
            seed=seed,
            weights=weights,
        )

    def evaluate(
        self,
        dataset: DataSet | None = None,
        *,
        data_path: str | None = None,
        out: str | Path | None = None,
        **wanted: Any,
    ) -> dict[str, Any]:
        """Evaluates the run as `experiments.evaluate` does, and writes `evaluation.json` and page.

            result = run.evaluate(num_samples=1000, solvers="ddim", num_steps=[5, 10])
            result["frechet_distance"]["value"]

        Args:
            dataset: the real images; by default those that the run was trained on.
            data_path: where these lie now, if they have moved.
            out: folder for the results, in the place of the run's own.
            **wanted: flags of `experiments.evaluate`, or attributes of
                `diffjax.runs.measuring.measure.Wanted`: `solvers`, `grids`, `num_steps`,
                `num_samples`, `labels`, `prompts`, `batch_size`, `guidance_scale`, `guidance`,
                `against`, `seed`, `weights`, `extractor`. Those that are lists take one value too.

        Returns:
            The content of `evaluation.json`.

        Raises:
            UserError: an unknown name, or what the command refuses.
        """
        check_arguments(Run.evaluate, dataset=dataset, data_path=data_path, out=out)
        from diffjax.runs.measuring.evaluating import evaluate_run  # It imports this module.

        return evaluate_run(self, dataset, data_path=data_path, out=out, **wanted)

    def dataset(self, path: str | None = None) -> DataSet:
        """The data set that the run was trained on.

        Args:
            path: the path of the data if they were moved.

        Raises:
            UserError: the data are missing, or differ from those that the run was trained on.
        """
        check_arguments(Run.dataset, path=path)
        return workdirs.data_of(self.workdir, self.config.data, path)

    def metrics(self) -> dict[str, np.ndarray]:
        """The logged metrics by name, `[records]` each, with `step`; a missing value is NaN.

            metrics = run.metrics()
            plt.plot(metrics["step"], metrics["loss"])

        Raises:
            UserError: the file is damaged.
        """
        return metrics_arrays(read_metrics(self.workdir))

    def __repr__(self) -> str:
        wired = self.parts.wired
        return (
            f"Run({str(self.workdir)!r}, step {self.step:,} of {self.config.num_steps:,}: "
            f"{type(wired.network).__name__} of {wired.num_params:,} parameters, "
            f"{self.parts.codec.describe(wired.image_shape)}, "
            f"{wired.condition.describe()}, weights {self.config.weights})"
        )


def _reader(mesh: Mesh | None = None) -> Callable[[str, str | None], Run]:
    """`load` with a cache of the last four runs, on the devices of the run that they guide."""
    return lru_cache(4)(lambda folder, weights: load(folder, mesh, weights=weights))


def load(
    workdir: str | Path,
    mesh: Mesh | None = None,
    *,
    step: int | str | None = None,
    weights: str | None = None,
    allowed_packages: tuple[str, ...] = ("diffjax",),
) -> Run:
    """Loads the weights of a run's newest undamaged checkpoint onto the available devices.

        run = diffjax.load("runs/digits")
        images = run.sample([0, 1, 2], guidance_scale=2.0)

    Other weights and the optimizer's state (`run.state`) are read, and verified, at their first
    use. The data set is not needed, nothing in the folder is changed, and the run may have been
    trained on another mesh.

    Args:
        workdir: the run's folder.
        mesh: from `diffjax.training.sharding.make_mesh`; by default all devices split the batch.
            `make_mesh(data=1, fsdp=-1)` splits a network that is too large for one device.
        step: the step of another checkpoint, or "best" for the best one by `config.best_by`.
        weights: `live` or the name of an average, instead of `config.weights`. The average may be
            one that `experiments.average` reconstructed after training.
        allowed_packages: packages whose callables the saved config may name.

    Raises:
        UserError: the folder has no run, no such checkpoint, no readable checkpoint or no such
            weights; or the mesh has other axes.
    """
    check_arguments(
        load,
        workdir=workdir,
        mesh=mesh,
        step=step,
        weights=weights,
        allowed_packages=allowed_packages,
    )
    if mesh is not None and mesh.axis_names != AXES:
        raise UserError(
            f"a mesh has the axes {', '.join(AXES)}, not {', '.join(map(str, mesh.axis_names))}: "
            "diffjax.training.sharding.make_mesh makes one"
        )
    workdir = Path(workdir)
    with progress(f"reading {workdir}"):
        parts = workdirs.read_parts(workdir, allowed_packages, mesh)
        name = weights or parts.config.weights
        kept = name in (LIVE, *parts.abstract.ema)
        folder = _folder_of(workdir, step)
        with workdirs.version_told(workdir):
            wanted = parts.abstract.only(name if kept else None)
            state, meta = _restored(folder, step, wanted)
        known = {name: state.weights(name)} if kept else {}
        saved = Saved(folder, meta["step"], parts.abstract, known)
        saved.weights(name)  # One that was made after training is read, any other one is refused.
    with parts.config.unlocked():
        parts.config.weights = name
    return Run(parts, saved, workdir, _reader(mesh))


def _folder_of(workdir: Path, step: int | str | None) -> Path:
    """The folder of a checkpoint by its step; of the newest one for None."""
    if isinstance(step, str) and step != BEST:
        raise UserError(f"step={step!r}: it is the number of a step, or {BEST!r}")
    folder = workdir / (BEST if step == BEST else "checkpoints")
    steps: list[int] = []
    if folder.is_dir():
        with closing(Checkpoints(folder, read_only=True)) as kept:
            steps = kept.steps()
    if isinstance(step, int) and step not in steps:
        there = ", ".join(map(str, steps)) or "none"
        raise UserError(f"{workdir} has no checkpoint of step {step}: there are {there}")
    if not steps and step == BEST:
        raise UserError(f"{workdir} has no best checkpoint: train it with config.best_by")
    if not steps:
        raise UserError(f"{workdir} has no checkpoint yet: train it first")
    return folder


def _restored(
    folder: Path, step: int | str | None, wanted: TrainState
) -> tuple[TrainState, dict[str, Any]]:
    """The state and the meta of a checkpoint by its step; of the newest one otherwise."""
    with closing(Checkpoints(folder, read_only=True)) as kept:
        if isinstance(step, int):
            return kept.read(step, wanted)
        restored = kept.restore(wanted, set_damaged_aside=False)
    if restored is None:
        raise UserError(f"{folder} has no whole checkpoint")
    return restored
