"""Finds sampling grids optimised for a run, and stores them in its folder."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path as Folder
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from diffjax.errors import UserError
from diffjax.host.run_files import read_json
from diffjax.process.paths import Path
from diffjax.runs.samples.model import Model, Request
from diffjax.sampling import grid_search
from diffjax.sampling.grids import Grid, ListedTimes
from diffjax.sampling.sample import Recipe
from diffjax.sampling.solvers import Solver

FOUND = "found"


def grid_file(workdir: str | Folder, solver: str, num_steps: int) -> Folder:
    """The file of the grid found for a run, a solver and a number of steps.

    Example:
        >>> grid_file("runs/digits", "ddim", 5).as_posix()
        'runs/digits/grids/ddim_5.json'
    """
    return Folder(workdir) / "grids" / f"{solver}_{num_steps}.json"


def read_grid(workdir: str | Folder, solver: str, num_steps: int, path: Path) -> ListedTimes:
    """The grid found for a run, from its folder.

    Raises:
        UserError: none was found yet, or the file does not fit this path and number of steps.
    """
    file = grid_file(workdir, solver, num_steps)
    content = read_json(file)
    again = (
        f"python -m experiments.find_grid --workdir={workdir} --solver={solver} "
        f"--num_steps={num_steps}"
    )
    if content is None:
        raise UserError(f"{file} is not there: no grid has been found yet; {again}")
    wrong = _what_is_wrong(content, num_steps, path)
    if wrong:
        raise UserError(f"{file}: {wrong}; make it again: {again}")
    # The first time is exactly the path's, without rounding.
    return ListedTimes((float(path.t_noise), *content["times"][1:-1]))


def _what_is_wrong(content: Mapping[str, Any], num_steps: int, path: Path) -> str | None:
    """The reason why a saved grid does not fit this path and number of steps, if there is one."""
    times, name = content.get("times"), type(path).__name__
    if not isinstance(times, list) or any(type(t) not in (int, float) for t in times):
        return "its times are no list of numbers"
    if content.get("path") != name:
        return f"it was found on path {content.get('path')}, and this run's is {name}"
    if len(times) != num_steps + 1:
        return f"it has {len(times)} times, and {num_steps} steps need {num_steps + 1}"
    if times[-1] != 0:
        return f"it ends in {times[-1]:g}, not in 0"
    if not all(later < t for t, later in pairwise(times)):
        return "its times don't fall from one to the next"
    first, least = float(path.t_noise), float(path.t_min)
    if not np.isclose(times[0], first, rtol=1e-6) or times[-2] < least * (1 - 1e-6):
        return f"its times are not from t_noise={first:g} down to t_min={least:g} at the least"
    return None


@dataclass(frozen=True)
class Search:
    """The measured costs of one model and solver, for searches with any number of steps.

    Attributes:
        recipe: solver and guidance; its grid and number of steps play no part.
        times: the M candidates.
        costs: `[M, M+1]`, of the jumps between them and to clean data.
        distances: `(grid, n, held_out) -> float`, the mean over samples of the root mean square
            distance from the teacher's ends: of those searched on, or of as many others.
    """

    recipe: Recipe
    times: tuple[float, ...]
    costs: np.ndarray
    distances: Callable[[Grid, int, bool], float]

    def find(self, n: int) -> ListedTimes:
        """Finds the grid of n steps with the least summed cost, then refines it to the least error.

        Raises:
            UserError: there are fewer candidates, or every grid of them has an infinite error.
        """

        def end_error(chosen: Sequence[int]) -> float:
            error = self.distances(self._grid(chosen), n, False)
            return error if np.isfinite(error) else np.inf

        chosen = grid_search.cheapest(self.costs, n)
        return self._grid(grid_search.refined(end_error, chosen, len(self.costs)))

    def predicted(self, grid: ListedTimes) -> float:
        """The sum of a grid's costs; its times are among the candidates."""
        return grid_search.summed(self.costs, [self.times.index(t) for t in grid.times])

    def _grid(self, chosen: Sequence[int]) -> ListedTimes:
        return ListedTimes(tuple(self.times[i] for i in chosen))


def prepare(
    model: Model,
    recipe: Recipe,
    teacher: Solver,
    request: Request,
    *,
    num_candidates: int = 64,
    batch_size: int = 16,
) -> Search:
    """Samples with the teacher and measures the error of every jump between two candidate times.

    Grids are found on the first half of the samples and tested on the other half.

    Args:
        model: whose samples they are.
        recipe: solver and guidance; its grid and number of steps play no part.
        teacher: an accurate solver that does not look back.
        request: 2n samples.
        num_candidates: times to choose from, and the teacher's steps.
        batch_size: samples at a time; the network sees up to `num_candidates` images for each.

    Raises:
        UserError: fresh noise, or a teacher that looks back.
    """
    _check_solvers(recipe.solver, teacher)
    path, half = model.wired.path, len(request) // 2
    searched_on = request.only(np.arange(half))
    fine = replace(recipe, grid=grid_search.candidate_times, num_steps=num_candidates)
    walk = grid_search.JumpCosts(teacher)
    costs = np.zeros((num_candidates, num_candidates + 1))
    for some in searched_on.batches(batch_size):
        jumps = model.walk(walk, fine, some, fine.grid(path, num_candidates))
        costs += np.asarray(jumps.costs, np.float64) * (len(some) / half)
    at_once = min(256, half)
    ends = model.sample_latents(replace(fine, solver=teacher), request, batch_size=at_once)

    def distances(grid: Grid, n: int, held_out: bool) -> float:
        tried = replace(recipe, grid=grid, num_steps=n)
        some = request if held_out else searched_on
        found = model.sample_latents(tried, some, batch_size=at_once)
        wrong = np.sqrt(np.mean((found - ends[: len(some)]) ** 2, axis=(1, 2, 3)))
        return float(np.mean(wrong[half:] if held_out else wrong))

    # The first time is exactly the path's, without rounding.
    inner = grid_search.candidate_times(path, num_candidates)[1:-1].tolist()
    return Search(recipe, (float(path.t_noise), *inner), costs, distances)


def _check_solvers(solver: Solver, teacher: Solver) -> None:
    if solver.nfe is None or teacher.nfe is None:
        raise UserError("a solver that chooses its own steps has no use for a grid")
    if solver.fresh_noise or teacher.fresh_noise:
        raise UserError(
            "a solver or teacher that adds fresh noise has no trajectory that steps could be held "
            "against; take a deterministic one"
        )
    if jax.tree.leaves(teacher.init(jnp.zeros((1, 1)))):
        raise UserError("the teacher looks back at earlier steps; take one that does not, as rk4")
