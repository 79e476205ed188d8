"""Samples of an evaluation, kept in the run's folder until it has ended, so that it can go on."""

import hashlib
import json
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import numpy as np

import diffjax
from diffjax.evaluation import cached_arrays
from diffjax.evaluation.evaluate import NamedRecipe
from diffjax.runs.checkpoints import digest
from diffjax.runs.load import Run
from diffjax.runs.samples.model import Model, Request
from diffjax.spec import to_json

FOLDER = "evaluation_samples"
WORTH_SECONDS = 1.0
"""Batches that are drawn in less are drawn again."""


@dataclass(frozen=True, eq=False)
class KeptSamples:
    """Batches of samples that are read from files where an evaluation before this one drew them.

    A file is found by the hash of all that its samples depend on: config, weights, recipe,
    conditions, seed, rows, versions and devices, but not the source code. Of a run of several
    processes nothing is kept.

    Args:
        run: the model; the files lie in its folder.
        model: the weights.
        named: the recipe.

    Attributes:
        seconds: how long each batch that was read took to draw.
    """

    run: Run
    model: Model
    named: NamedRecipe
    seconds: list[float] = field(default_factory=list)

    def __call__(self, some: Request, draw: Callable[[], np.ndarray]) -> np.ndarray:
        """The latents of a batch, read or drawn."""
        if jax.process_count() > 1:
            return draw()
        folder, made = self.run.workdir / FOLDER, []

        def drawn() -> dict[str, np.ndarray]:
            began = time.perf_counter()
            latents = draw()
            made.append({"latents": latents, "seconds": np.array(time.perf_counter() - began)})
            return made[0]

        # Nothing is computed of the weights where nothing is read or stored.
        if not folder.is_dir() and not _worth(drawn()):
            return made[0]["latents"]
        facts = self._facts | {"request": _sha256_of(some)}
        found = cached_arrays.cached(
            str(folder), facts, lambda: made[0] if made else drawn(), worth=_worth
        )
        if not made:
            self.seconds.append(float(found["seconds"]))
        return found["latents"]

    @cached_property
    def _facts(self) -> dict[str, Any]:
        recipe, weaker = self.named.recipe, self.model.weaker(self.named.recipe)
        return {
            "config": json.loads(to_json(self.run.config)),
            "weights": digest(self.model.params),
            "weaker": None if weaker is None else digest(weaker.params),
            "solver": self.named.solver,
            "times": np.asarray(recipe.times(self.model.wired.path), float).tolist(),
            "guidance": [recipe.guidance_scale, repr(recipe.guidance)],
            "against": repr(recipe.against),
            "versions": [diffjax.__version__, jax.__version__],
            "devices": [jax.default_backend(), self.model.mesh.size],
        }


def _worth(arrays: Mapping[str, np.ndarray]) -> bool:
    return float(arrays["seconds"]) >= WORTH_SECONDS


def forget(workdir: Path) -> None:
    """Deletes the samples that were kept for an evaluation, which has ended."""
    shutil.rmtree(workdir / FOLDER, ignore_errors=True)


def _sha256_of(request: Request) -> str:
    known = hashlib.sha256(f"{request.seed}".encode())
    parts = (request.rows, request.condition, request.source, request.negative)
    for path, leaf in jax.tree_util.tree_leaves_with_path(parts):
        array = np.ascontiguousarray(leaf)
        known.update(f"{jax.tree_util.keystr(path)} {array.dtype} {array.shape}".encode())
        known.update(array.data)
    return known.hexdigest()
