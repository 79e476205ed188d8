"""Averages of any length after training, from snapshots of power-function averages (EDM2).

While a run trains, its power-function averages (`config.ema_lengths`) are stored in `snapshots/`
every `config.snapshot_every_steps` steps. Each is a weighted mean of the parameters over steps,
with known weights p_i(τ) (`diffjax.training.averages`). Another mean, with weights p(τ), is
approximated by the combination Σ x_i·snapshot_i whose weights are nearest,

    x = argmin ∫ (p(τ) − Σ x_i·p_i(τ))² dτ,    then scaled to Σ x_i = 1

(Karras et al. 2024, arXiv:2312.02696, section 3.1 and appendix C).
"""

import re
import shutil
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from diffjax.errors import UserError
from diffjax.kinds import complaint
from diffjax.runs import workdirs
from diffjax.runs.checkpoints import Checkpoints, Damaged
from diffjax.runs.parts import Parts
from diffjax.settings import Length
from diffjax.training.averages import Averages, gamma_of, power_name

SNAPSHOTS, AVERAGES = "snapshots", "averages"
_NAME = re.compile(r"(power-[0-9.e+-]+)(?:@([0-9]+))?")


class Profile(NamedTuple):
    """The weights of a power-function average: its length, and the step where it is taken."""

    length: float
    step: int


class Snapshot(NamedTuple):
    """What is stored of a step: averages by name."""

    averages: dict[str, Any]


class Reconstructed(NamedTuple):
    """An average that was made after training.

    Attributes:
        name: what `diffjax.load(…, weights=name)` calls it.
        step: the step of training, where it is taken.
        error: `|p − Σ x_i·p_i|/|p|`, how far its weights are from those of the wanted length.
        num_snapshots: how many snapshots it is made from.
    """

    name: str
    step: int
    error: float
    num_snapshots: int


def snapshots_of(workdir: Path, *, read_only: bool = False) -> Checkpoints:
    """The snapshots of a run, all of which are kept."""
    return Checkpoints(workdir / SNAPSHOTS, keep=None, read_only=read_only)


def inner_products(some: Sequence[Profile], others: Sequence[Profile]) -> np.ndarray:
    """`∫ p(τ)·q(τ) dτ` of power-function profiles, `[len(some), len(others)]`, in closed form.

    With exponents a, b at steps s, t and m = min(s, t):

        (a + 1)·(b + 1)/(a + b + 1) · (m/s)^a·(m/t)^b·m/(s·t)

    Example:
        >>> mean = Profile(1 / 12**0.5, 10)  # all weights are 1/10
        >>> inner_products([mean], [mean]).round(6).tolist()
        [[0.1]]
    """
    a, s = (column[:, None] for column in _exponents_and_steps(some))
    b, t = _exponents_and_steps(others)
    m = np.minimum(s, t)
    return (a + 1) * (b + 1) / (a + b + 1) * (m / s) ** a * (m / t) ** b * m / (s * t)


def _exponents_and_steps(profiles: Sequence[Profile]) -> tuple[np.ndarray, np.ndarray]:
    gammas = {length: gamma_of(length) for length in {each.length for each in profiles}}
    return (
        np.array([gammas[each.length] for each in profiles]),
        np.array([float(each.step) for each in profiles]),
    )


def coefficients(stored: Sequence[Profile], wanted: Profile) -> tuple[np.ndarray, float]:
    """The combination of stored averages that is nearest to a wanted one, and how far it is.

    With the inner products A_ij = ∫p_i·p_j and b_i = ∫p_i·p, x solves A·x = b. It is solved for
    profiles of norm 1, whose matrix has a condition of 1e6 for 100 snapshots of two lengths.

    Args:
        stored: profiles of the snapshots.
        wanted: the profile to reconstruct.

    Returns:
        x `[len(stored)]` float64, of sum 1, and `|p − Σ x_i·p_i|/|p|`: a bound on the error of the
        average over the root of the sum of squares of parameters by step, times |p|.

    Example:
        >>> stored = [Profile(length, 10 * n) for n in range(1, 101) for length in (0.05, 0.1)]
        >>> x, error = coefficients(stored, Profile(0.07, 1000))
        >>> bool(abs(x.sum() - 1) < 1e-12), round(error, 5)
        (True, 0.0001)
    """
    gram = inner_products(stored, stored)
    towards = inner_products(stored, [wanted])[:, 0]
    norms = np.sqrt(np.diag(gram))
    scaled = np.linalg.lstsq(gram / np.outer(norms, norms), towards / norms, rcond=None)[0]
    x = scaled / norms
    x = x / x.sum()
    whole = inner_products([wanted], [wanted])[0, 0]
    left = whole - 2 * x @ towards + x @ gram @ x
    return x, float(np.sqrt(max(left, 0.0) / whole))


def reconstruct(
    workdir: str | Path,
    length: float,
    step: int | None = None,
    *,
    allowed_packages: tuple[str, ...] = ("diffjax",),
) -> Reconstructed:
    """Computes the average of a length, in float64 on the host, and stores it in the run's folder.

        reconstruct("runs/digits", 0.07)
        images = diffjax.load("runs/digits", weights="power-0.07").sample(16)

    Args:
        workdir: a run that was trained with `config.ema_lengths`, or is being trained.
        length: the length of the average, above 0 and up to 0.2886.
        step: the step of training, where the average is taken; one of the snapshots, by default the
            newest.
        allowed_packages: whose callables the saved config may name.

    Raises:
        UserError: a length out of range, no snapshots, none of that step, or a damaged one.
    """
    workdir = Path(workdir)
    if wrong := complaint("length", length, Length):
        raise UserError(wrong)
    parts = workdirs.read_parts(workdir, allowed_packages)
    averages = Averages.of(parts.config)
    if not averages.lengths or not (workdir / SNAPSHOTS).is_dir():
        raise UserError(
            f"{workdir} has no snapshots of averages: train with --config.ema_lengths=0.05,0.1"
        )
    with closing(snapshots_of(workdir, read_only=True)) as snapshots:
        step = _chosen(workdir, snapshots.steps(), step)
        steps = [each for each in snapshots.steps() if each <= step]
        stored = [Profile(kept, each) for each in steps for kept in averages.lengths]
        x, error = coefficients(stored, Profile(length, step))
        average = _combined(snapshots, parts, steps, x.reshape(len(steps), -1))
    name = power_name(length)
    _store(workdir, step, name, average, {"length": length, "error": error})
    return Reconstructed(name, step, error, len(steps))


def _chosen(workdir: Path, steps: Sequence[int], step: int | None) -> int:
    """The step of a snapshot: the wanted one, or the newest."""
    if not steps:
        raise UserError(f"{workdir / SNAPSHOTS} is empty: the run has made no snapshot yet")
    if step is not None and step not in steps:
        nearest = min(steps, key=lambda each: abs(each - step))
        raise UserError(f"{workdir} has no snapshot of step {step}; the nearest is {nearest}")
    return steps[-1] if step is None else step


def _combined(snapshots: Checkpoints, parts: Parts, steps: Sequence[int], x: np.ndarray) -> Any:
    """`Σ x_i·snapshot_i` in float64, one snapshot at a time; x is `[snapshots, lengths]`."""
    names = [power_name(length) for length in Averages.of(parts.config).lengths]
    params = parts.abstract.params
    total = jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float64), params)
    for step, row in zip(steps, x, strict=True):
        try:
            snapshot, _ = snapshots.read(step, Snapshot(dict.fromkeys(names, params)))
        except Damaged as error:
            raise UserError(
                f"{error}; move {snapshots.folder / str(step)} away, and the average is made from "
                "the other snapshots"
            ) from error
        for name, share in zip(names, row, strict=True):
            total = jax.tree.map(
                lambda old, new, share=share: old + share * np.asarray(new, np.float64),
                total,
                snapshot.averages[name],
            )
    return jax.tree.map(
        lambda mean, leaf: jax.device_put(mean.astype(leaf.dtype), leaf.sharding), total, params
    )


def _store(workdir: Path, step: int, name: str, average: Any, meta: dict[str, Any]) -> None:
    """Leaves an average, in the place of one of the same name and step."""
    folder = workdir / AVERAGES / f"{name}@{step}"
    try:
        if folder.is_dir():
            shutil.rmtree(folder)
        with closing(Checkpoints(folder)) as store:
            store.save(step, Snapshot({name: average}), meta)
    except OSError as error:
        raise UserError(f"can't write {folder}: {error.strerror}") from error


def is_reconstructed(name: str, kept: Sequence[str]) -> bool:
    """Whether a name is that of an average made after training, not one that the run keeps.

    Example:
        >>> is_reconstructed("power-0.07", ["power-0.05"]), is_reconstructed("ema-0.9", [])
        (True, False)
    """
    return name not in kept and _NAME.fullmatch(name) is not None


def read_reconstructed(workdir: Path, name: str, step: int, params: Any) -> Any:
    """The average that `reconstruct` left, onto the devices.

    Args:
        workdir: the folder of the run.
        name: `power-0.07`, of `step`, or `power-0.07@2000`, of step 2,000.
        step: where the run is.
        params: what is to be read, as `ShapeDtypeStruct` with shardings.

    Raises:
        UserError: no average of that length and step was made, or its file is damaged.
    """
    match = _NAME.fullmatch(name)
    assert match is not None, "checked by `is_reconstructed`"
    plain, at = match[1], int(match[2] or step)
    folder = workdir / AVERAGES / f"{plain}@{at}"
    made = f"python -m experiments.average --workdir={workdir} --length={plain[len('power-') :]}"
    if not folder.is_dir():
        others = ", ".join(sorted(path.name for path in folder.parent.glob("power-*")))
        raise UserError(
            f"{workdir} has no weights {plain}@{at}: {made} --step={at} makes them from snapshots"
            + (f"; there are {others}" if others else "")
        )
    try:
        with closing(Checkpoints(folder, read_only=True)) as store:
            return store.read(at, Snapshot({plain: params}))[0].averages[plain]
    except Damaged as error:
        raise UserError(f"{error}; {made} --step={at} makes {folder} again") from error
