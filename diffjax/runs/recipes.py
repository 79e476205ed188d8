"""A run's recipe with some parts chosen, by the names that flags take or as values."""

from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

from ml_collections import ConfigDict

from diffjax import choices, lookup
from diffjax.errors import UserError
from diffjax.evaluation.evaluate import NamedRecipe
from diffjax.runs.found_grids import FOUND, grids_for
from diffjax.sampling.grids import Grid
from diffjax.sampling.guidance import Against, Rule
from diffjax.sampling.sample import Recipe
from diffjax.sampling.solvers import Solver
from diffjax.spec import TARGET, build, choose

if TYPE_CHECKING:  # `runs.load` imports this module.
    from diffjax.runs.load import Run


class Guided(NamedTuple):
    """Changes of a recipe's guidance, by name or as values; None keeps the recipe's own."""

    scale: float | None = None
    rule: str | Rule | None = None
    against: str | Against | None = None


def recipe_of(
    run: "Run",
    solver: str | Solver | None = None,
    grid: str | Grid | None = None,
    num_steps: int | None = None,
    guided: Guided = Guided(),
) -> Recipe:
    """A run's recipe with some parts chosen, each by the name that flags take, or as a value.

    Raises:
        UserError: an unknown solver, grid or guidance, or no grid has been found yet.
    """
    parts: dict[str, Any] = {
        "solver": lookup.solver_called(solver) if isinstance(solver, str) else solver,
        "grid": _grid_called(run, solver, grid, num_steps) if isinstance(grid, str) else grid,
        "num_steps": num_steps,
        "guidance_scale": guided.scale,
        "guidance": build(lookup.guidance_called(guided.rule))
        if isinstance(guided.rule, str)
        else guided.rule,
        "against": build(lookup.against_called(guided.against))
        if isinstance(guided.against, str)
        else guided.against,
    }
    return replace(run.recipe, **{name: part for name, part in parts.items() if part is not None})


def named_recipe(
    run: "Run",
    solver: str | None = None,
    grid: str | None = None,
    num_steps: int | None = None,
    guided: Guided = Guided(),
) -> NamedRecipe:
    """The same with the names of solver and grid, for a page.

    Raises:
        UserError: an unknown solver, grid or guidance, or no grid has been found yet.
    """
    saved = run.config.sampling
    return NamedRecipe(
        name_in(choices.SOLVERS, saved.solver) if solver is None else solver,
        name_in(choices.GRIDS, saved.grid) if grid is None else grid,
        recipe_of(run, solver, grid, num_steps, guided),
    )


def _grid_called(run: "Run", solver: str | Solver | None, grid: str, num_steps: int | None) -> Grid:
    if solver is None:
        solver = name_in(choices.SOLVERS, run.config.sampling.solver)
    if isinstance(solver, str):
        known = grids_for(run, solver, num_steps or run.recipe.num_steps)
    elif grid == FOUND:
        raise UserError(f"grid={FOUND!r} was found for a solver that has a name: use that name")
    else:
        known = choices.GRIDS
    return build(choose(known, grid, "grid"))


def name_in(table: choices.Table, config: ConfigDict) -> str:
    """What tables call a part of a config: the row that it equals, else its callable's name."""
    same = (name for name, row in table.items() if row.to_dict() == config.to_dict())
    return next(same, config[TARGET].rpartition(":")[2])
