"""Files of LoRA on a run or a published model, evaluated beside weights that stay as they are."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import jax

from diffjax.errors import UserError
from diffjax.models.families import LAYOUTS, Found
from diffjax.models.loras import factors_of, with_factors
from diffjax.models.low_rank import without_lora
from diffjax.pretrained.factors import Factors
from diffjax.pretrained.lora import NETWORK, Lora, read_lora
from diffjax.pretrained.tables import published_shapes
from diffjax.runs.load import Arrays, Run
from diffjax.runs.parts import Parts, build_parts
from diffjax.spec import as_spec
from diffjax.training.state import LIVE, TrainState

R = TypeVar("R", bound=Run)


@dataclass(frozen=True, eq=False)
class _Beside:
    """The weights of a run with A and B beside kernels."""

    run: Run
    factors: Mapping[str, Factors]
    parts: Parts

    @property
    def step(self) -> int:
        return self.run.step

    def weights(self, name: str) -> Any:
        params, _ = with_factors(self.run.merged(name), self.factors)
        places = self.parts.abstract.weights(LIVE)
        return jax.tree.map(lambda x, like: jax.device_put(x, like.sharding), params, places)

    def read(self, abstract: TrainState) -> TrainState:
        del abstract
        raise UserError(f"{self.run.workdir} with files of LoRA has no state of a training")


def with_loras(run: R, loras: Mapping[str, float]) -> R:
    """The model with files of LoRA, whose changes are evaluated beside its weights.

        model = diffjax.from_pretrained("FOLDER")
        images = with_loras(model, {"a.safetensors": 0.8, "b.safetensors": -0.5}).sample(["a cat"])

    Nothing is read again, and the kernels are those of `run`, in memory once for any number of such
    models. Each step takes a little longer than with merged weights, which are those of
    `from_pretrained(..., loras=...)`. Changes that a run was trained to are merged first.

    Args:
        run: a run or a published model, of a network whose layers have published names.
        loras: files with their weights; 1 is as a file was trained. Of several they add up.

    Raises:
        UserError: a file can't be read, is of another network or of text encoders too, which can't
            be changed there; or no files at all.
    """
    if not isinstance(loras, Mapping) or not loras:
        raise UserError(f'loras={loras!r} is to be files and weights, as {{"FILE": 0.8}}')
    files = tuple(read_lora(file, weight) for file, weight in loras.items())
    for lora in files:
        if others := [part for part in lora.parts if part != NETWORK]:
            raise UserError(
                f"the LoRA {lora.file} is of {others[0]} too, whose states are encoded already: "
                "merge it, by from_pretrained(..., loras=...)"
            )
    factors, config = _factors(run, files), run.config.copy_and_resolve_references()
    _, layers = with_factors(without_lora(run.parts.wired.params_shape), factors)
    with config.unlocked():
        config.lora = as_spec(layers)
    wired = run.parts.wired
    parts = build_parts(
        config.lock(), wired.image_shape, wired.condition, run.parts.mesh, run.parts.codec
    )
    arrays: Arrays = _Beside(run, factors, parts)
    return replace(run, parts=parts, arrays=arrays, loras=(*run.loras, *files))


def _factors(run: Run, files: tuple[Lora, ...]) -> dict[str, Factors]:
    denoiser = run.parts.denoiser
    layouts = LAYOUTS.get(type(denoiser.network))
    if not layouts:
        raise UserError(
            f"{type(denoiser.network).__name__} is no published network, so that files of LoRA "
            "have no names for its layers"
        )
    name, family = next(iter(layouts.items()))
    state = published_shapes(family.table(denoiser), family.shapes(denoiser))
    return factors_of(Found(denoiser, name, family, state, str(run.workdir)), files, NETWORK)
