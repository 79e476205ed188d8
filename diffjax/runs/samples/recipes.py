"""Changes parts of a sampling recipe, by the names that flags have or by values."""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from ml_collections import ConfigDict

from diffjax import choices, lookup
from diffjax.errors import UserError
from diffjax.evaluation.evaluate import NamedRecipe
from diffjax.runs.samples.found_grids import FOUND, read_grid
from diffjax.sampling.grids import Grid
from diffjax.sampling.guidance import Rule
from diffjax.sampling.sample import Recipe
from diffjax.sampling.solvers import Solver
from diffjax.settings import check_whole
from diffjax.spec import TARGET, build, check_arguments, choose

if TYPE_CHECKING:  # `runs.load` imports this module.
    from diffjax.runs.load import Run


@dataclass(frozen=True)
class Chosen:
    """Parts of a recipe by name, as in flags, or by value; None keeps the part of the recipe.

    Attributes:
        solver: the rule of a step.
        grid: the times of the steps.
        num_steps: intervals of the grid, from 1.
        guidance_scale: 1 is off.
        guidance: how two predictions are combined, as "cfg+limited".
        against: the source of the second prediction, as "label:3", or a value of
            `diffjax.sampling.guidance`.

    Raises:
        UserError: an argument has another type.

    Example:
        >>> from diffjax.sampling.solvers import heun
        >>> recipe = Recipe(heun(), build(choices.GRIDS["uniform"]), num_steps=18)
        >>> Chosen("ddim", num_steps=5).of(recipe).num_steps
        5
    """

    solver: str | Solver | None = None
    grid: str | Grid | None = None
    num_steps: int | None = None
    guidance_scale: float | None = None
    guidance: str | Rule | None = None
    against: Any = None

    def __post_init__(self) -> None:
        if self.num_steps is not None:
            check_whole("num_steps", self.num_steps, 1)
        named = {name: value for name, value in vars(self).items() if name != "num_steps"}
        check_arguments(Chosen, **named)

    def of(self, recipe: Recipe) -> Recipe:
        """The recipe with these parts replaced.

        Raises:
            UserError: an unknown name.
        """
        made = {
            "solver": lookup.solver_called,
            "grid": lambda name: build(choose(choices.GRIDS, name, "grid")),
            "guidance": lambda name: build(lookup.guidance_called(name)),
            "against": lambda name: build(lookup.against_called(name)),
        }
        parts = {name: part for name, part in vars(self).items() if part is not None}
        return replace(
            recipe,
            **{
                name: made[name](part) if isinstance(part, str) else part
                for name, part in parts.items()
            },
        )


def with_found_grid(run: "Run", chosen: Chosen) -> Chosen:
    """The same choices with the grid "found" replaced by the one found for this run and solver.

    Raises:
        UserError: no grid has been found yet, or the solver has no name.
    """
    if not isinstance(chosen.grid, str):
        return chosen
    choose({**choices.GRIDS, FOUND: None}, chosen.grid, "grid")
    if chosen.grid != FOUND:
        return chosen
    solver = chosen.solver or name_in(choices.SOLVERS, run.config.sampling.solver)
    if not isinstance(solver, str):
        raise UserError(f"grid={FOUND!r} was found for a solver that has a name: use that name")
    num_steps, path = chosen.num_steps or run.recipe.num_steps, run.parts.wired.path
    return replace(chosen, grid=read_grid(run.workdir, solver, num_steps, path))


def named_recipe(run: "Run", chosen: Chosen = Chosen()) -> NamedRecipe:
    """A run's recipe with some parts chosen, and the names of solver and grid for a page.

    Raises:
        UserError: an unknown solver, grid or guidance, or no grid has been found yet.
    """
    saved, solver, grid = run.config.sampling, chosen.solver, chosen.grid
    return NamedRecipe(
        solver if isinstance(solver, str) else name_in(choices.SOLVERS, saved.solver),
        grid if isinstance(grid, str) else name_in(choices.GRIDS, saved.grid),
        with_found_grid(run, chosen).of(run.recipe),
    )


def name_in(table: choices.Table, config: ConfigDict) -> str:
    """The name of a part of a config: that of the equal row of a table, else its callable's."""
    same = (name for name, row in table.items() if row.to_dict() == config.to_dict())
    return next(same, config[TARGET].rpartition(":")[2])
