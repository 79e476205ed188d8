"""Cascades: a base model, and models that enlarge its samples one after the other."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from diffjax.conditions import Condition, Images, Several
from diffjax.errors import UserError
from diffjax.runs.samples.model import Model, Request, sample_keys
from diffjax.sampling.sample import Recipe

# Folded into the keys of samples, so that no other random number shares them.
_AUGMENTATION = 0x6C72


@dataclass(frozen=True, eq=False)
class Stage:
    """A model of a cascade, and how it is sampled.

    Attributes:
        model: the base model, or one that enlarges images.
        recipe: solver, grid, steps and guidance.
        level: the level of the noise in the small image, a time on the path of its augmentation; 0
            is the image as it is, 0.1 to 0.3 are typical. The base model has none.
        name: the name of the model, for errors.
    """

    model: Model
    recipe: Recipe
    level: float = 0.0
    name: str = "the model"


@dataclass(frozen=True, eq=False)
class Cascade:
    """A base model and models that enlarge: each has the images of the one before as condition.

    Other parts of a condition, such as the class, are those of the base model's.

        base, up = diffjax.load("runs/digits_small"), diffjax.load("runs/digits_upscale")
        stages = Stage(base.model(), base.recipe), Stage(up.model(), up.recipe, level=0.2)
        small, large = Cascade(stages).sample(Request(np.arange(10)))

    Attributes:
        stages: the base model first.

    Raises:
        UserError: a model takes images of another size, or a condition that the base has not.

    References:
        Ho et al., "Cascaded Diffusion Models for High Fidelity Image Generation", 2021,
        arXiv:2106.15282
    """

    stages: Sequence[Stage]

    def __post_init__(self) -> None:
        base, *others = self.stages
        kind, shape = base.model.wired.condition, picture_shape(base.model)
        for stage in others:
            small = small_part(stage.model.wired.condition, stage.name)
            if small.shape != shape:
                there, here = ("x".join(map(str, s)) for s in (shape, small.shape))
                raise UserError(f"{stage.name} enlarges images of {here}, and those are of {there}")
            check_level(stage)
            _others(stage.model.wired.condition, kind, kind.null(1), stage.name)
            shape = picture_shape(stage.model)

    def sample(
        self,
        request: Request,
        batch_size: int = 256,
        begun: Callable[[int], Any] = lambda number: None,
    ) -> list[np.ndarray]:
        """The images of each stage, `[n, H, W, C]`, the last ones the largest.

        Each stage has noise of its own, all of them of the request's seed.

        Args:
            request: the samples of the base model.
            batch_size: samples at a time.
            begun: called with the number of each batch of each stage, before it is drawn.
        """
        small = _drawn(self.stages[0], request, batch_size, begun)
        return [small, *self.enlarged(small, request, batch_size, begun)]

    def enlarged(
        self,
        images: np.ndarray,
        request: Request,
        batch_size: int = 256,
        begun: Callable[[int], Any] = lambda number: None,
    ) -> list[np.ndarray]:
        """The images of each stage but the first, whose images are given; as `sample`."""
        base, *others = self.stages
        kind, found = base.model.wired.condition, [images]
        for number, stage in enumerate(others, start=1):
            condition = _others(stage.model.wired.condition, kind, request.condition, stage.name)
            seed = seed_of_stage(request.seed, number)
            wanted = enlarging(stage, found[-1], condition, seed, request.rows)
            found.append(_drawn(stage, wanted, batch_size, begun))
        return found[1:]


def enlarging(
    stage: Stage,
    images: np.ndarray,
    others: dict[str, Any],
    seed: int = 0,
    rows: np.ndarray | None = None,
) -> Request:
    """The samples of a model that enlarges, made from small images.

    Args:
        stage: the model, and the level of noise in the images.
        images: `[n, h, w, C]` in [-1, 1].
        others: the other parts of the condition by name, n rows each.
        seed: the seed of the noise.
        rows: `[n]`, the numbers of the samples.
    """
    kind, rows = stage.model.wired.condition, np.arange(len(images)) if rows is None else rows
    image = small_part(kind, stage.name).of(np.clip(images, -1.0, 1.0))
    name = name_of_small(kind)
    condition = image if name is None else {**others, name: image}
    return Request(at_level(kind, condition, stage.level, seed, rows), seed, rows=rows)


def at_level(kind: Condition, condition: Any, level: float, seed: int, rows: np.ndarray) -> Any:
    """A condition with noise in its small image, which depends on the seed and the samples' rows.

    Raises:
        UserError: training did not show that level.
    """
    if not level:
        return condition
    kind.check_level(level)
    keys = jax.vmap(jax.random.fold_in, (0, None))(sample_keys(seed, rows), _AUGMENTATION)
    return jax.tree.map(np.asarray, kind.at_level(keys, condition, level))


def check_level(stage: Stage) -> None:
    """Refuses a level that the model was not trained with.

    Raises:
        UserError: it is.
    """
    if stage.level:
        try:
            stage.model.wired.condition.check_level(stage.level)
        except UserError as error:
            raise UserError(f"{stage.name}: {error}") from None


def seed_of_stage(seed: int, number: int) -> int:
    """The seed of the stage of that number, from 1: another one for each.

    Example:
        >>> seed_of_stage(0, 1) == seed_of_stage(0, 1) != seed_of_stage(0, 2)
        True
    """
    entropy = [seed % 2**64, number]
    return int(np.random.SeedSequence(entropy).generate_state(1)[0] >> 1)


def picture_shape(model: Model) -> tuple[int, int, int]:
    """`(H, W, C)` of the decoded samples of a model."""
    return model.codec.image_shape(model.wired.image_shape)


def small_part(kind: Condition, name: str) -> Images:
    """The part of a condition that is the small image.

    Args:
        kind: the condition.
        name: the name of its model, for errors.

    Raises:
        UserError: it has none, or several.
    """
    parts = kind.parts.values() if isinstance(kind, Several) else [kind]
    found = [part for part in parts if isinstance(part, Images)]
    if len(found) != 1:
        raise UserError(
            f"{name} enlarges no images: it is conditioned on {kind.describe()}; train one by "
            "configs/digits_upscale.py"
        )
    return found[0]


def name_of_small(kind: Condition) -> str | None:
    """The name of the small image among the parts of a condition; None where it is the only one."""
    if not isinstance(kind, Several):
        return None
    return next(name for name, part in kind.parts.items() if isinstance(part, Images))


def _others(kind: Condition, base: Condition, condition: Any, name: str) -> dict[str, Any]:
    """The parts of a condition beside the small image, from the base model's condition.

    Raises:
        UserError: the base model has no such part, and this one is never without it.
    """
    if not isinstance(kind, Several):
        return {}
    found, n = {}, len(jax.tree.leaves(condition)[0])
    for part_name, part in kind.parts.items():
        if isinstance(part, Images):
            continue
        rows = [rows for there, rows in _parts(base, condition) if there == part]
        if not rows and (part_name in kind.kept or not part.can_be_dropped):
            raise UserError(
                f"{name} is conditioned on {part_name} ({part.describe()}), and the base model is "
                f"not: it has {base.describe()}"
            )
        found[part_name] = rows[0] if rows else part.null(n)
    return found


def _parts(kind: Condition, condition: Any) -> Iterator[tuple[Condition, Any]]:
    if isinstance(kind, Several):
        yield from ((part, condition[name]) for name, part in kind.parts.items())
    else:
        yield kind, condition


def _drawn(
    stage: Stage, request: Request, batch_size: int, begun: Callable[[int], Any]
) -> np.ndarray:
    images = [*stage.model.batches(stage.recipe, request, batch_size, begun)]
    return np.concatenate([np.zeros((0, *picture_shape(stage.model)), np.float32), *images])
