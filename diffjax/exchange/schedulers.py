"""Schedulers of diffusers as our parts: what `scheduler/scheduler_config.json` means here.

A scheduler there is a path, a target, a grid and a solver in one. Where it leaves noise in samples,
begins off its path or rounds a noise level, an option of the part here does the same.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from diffjax import choices, lookup
from diffjax.errors import UserError, nearest
from diffjax.process import beta_tables, precond, shifts
from diffjax.sampling import consistency, grids, solvers
from diffjax.spec import TARGET, spec

Entries = Mapping[str, Any]


class Schedule(NamedTuple):
    """How samples are drawn by a scheduler of diffusers; specs for a config.

    Attributes:
        path: the path.
        target: what the network predicts.
        noise_label: how it knows the noise level.
        solver: takes the steps.
        grid: their times.
        unit_start: whether samples begin with noise of deviation 1.
        guidance: the rule, around which x0 may be clipped or thresholded.
        distilled: whether it is for networks that predict the end of the flow, in few steps.
    """

    path: ConfigDict
    target: ConfigDict
    noise_label: ConfigDict
    solver: ConfigDict
    grid: ConfigDict
    guidance: ConfigDict
    unit_start: bool = False
    distilled: bool = False


class _Kind(NamedTuple):
    """What a class of schedulers is here, and where it differs from the others.

    Attributes:
        solver: its name, or a function of the entries that returns a spec.
        spacing: the spacing of the grid, where the entries have none.
        left_out: steps of the grid that it counts and does not take.
        keeps_noise: whether `set_alpha_to_one=False` leaves noise in samples.
        scaled: whether the starting noise has the deviation of the path, but for `leading`.
        by_log_snr: whether pure noise is replaced by a little signal.
        whole_labels: whether noise labels between steps are rounded.
        whole_steps: whether the steps of `linspace` are rounded.
        distilled: whether it is for networks that were distilled on some of the steps, which are
            its grid.
        clips: whether it clips x0, where the entries do not say.
        table: the name of its betas, where the entries have none.
    """

    solver: str | Callable[[Entries], ConfigDict]
    spacing: str
    left_out: int = 0
    keeps_noise: bool = False
    scaled: bool = False
    by_log_snr: bool = False
    whole_labels: bool = False
    whole_steps: bool = True
    distilled: bool = False
    clips: bool = False
    table: str = "linear"


def _dpm_solver(entries: Entries) -> ConfigDict:
    order = int(entries.get("solver_order", 2))
    kind = str(entries.get("algorithm_type", "dpmsolver++"))
    if entries.get("solver_type", "midpoint") != "midpoint" or order not in (1, 2, 3):
        raise UserError(
            f"a scheduler of solver_type={entries.get('solver_type')!r} and solver_order={order} "
            "is not known here: midpoint of order 1 to 3 is"
        )
    known = {"dpmsolver++": 0.0, "sde-dpmsolver++": 1.0}
    if kind not in known:
        raise UserError(f"algorithm_type: no scheduler {kind!r} here; {nearest(kind, known)}")
    if order == 1:
        return choices.copy(choices.SOLVERS["ddpm" if known[kind] else "ddim"])
    solver = choices.copy(choices.SOLVERS["dpmpp_2m"])
    solver.order, solver.eta = order, known[kind]
    return solver


def _unipc(entries: Entries) -> ConfigDict:
    order = int(entries.get("solver_order", 2))
    if entries.get("solver_type") == "bh1":
        raise UserError("solver_type='bh1' is not known of UniPC here, and NaN there; 'bh2' is")
    if order not in (1, 2):
        # Of order 3, diffusers lowers the order of the last steps, which is not done here.
        raise UserError(f"solver_order={order} is not known of UniPC here: 1 and 2 are")
    solver = choices.copy(choices.SOLVERS["unipc"])
    solver.order = order
    return solver


def _pndm(entries: Entries) -> ConfigDict:
    if not entries.get("skip_prk_steps", False):
        raise UserError("PNDMScheduler with skip_prk_steps=False is not known here")
    return choices.copy(choices.SOLVERS["pndm"])


def _lcm(entries: Entries) -> ConfigDict:
    del entries
    return spec(consistency.consistency)


def _tcd(entries: Entries) -> ConfigDict:
    # Its last step goes to the first one of the table.
    solver = spec(consistency.trajectory_consistency, num_train_steps=_num_steps(entries))
    return spec(solvers.unfinished, solver=solver)


def _ddpm(entries: Entries) -> ConfigDict:
    learned = entries.get("variance_type") == "learned_range"
    return choices.copy(choices.SOLVERS["ddpm_learned" if learned else "ddpm"])


_KINDS: Mapping[str, _Kind] = {
    "DDIMScheduler": _Kind("ddim", "leading", keeps_noise=True, clips=True),
    "PNDMScheduler": _Kind(_pndm, "leading", keeps_noise=True),
    "DDPMScheduler": _Kind(_ddpm, "leading", clips=True),
    "UnCLIPScheduler": _Kind(_ddpm, "linspace", clips=True, table="squaredcos_cap_v2"),
    "EulerDiscreteScheduler": _Kind(
        "ddim", "linspace", scaled=True, by_log_snr=True, whole_steps=False
    ),
    "EulerAncestralDiscreteScheduler": _Kind(
        "ddpm", "linspace", scaled=True, by_log_snr=True, whole_steps=False
    ),
    "LMSDiscreteScheduler": _Kind("lms", "linspace", scaled=True, whole_steps=False),
    "DPMSolverMultistepScheduler": _Kind(
        _dpm_solver, "linspace", left_out=1, by_log_snr=True, whole_labels=True
    ),
    "UniPCMultistepScheduler": _Kind(
        _unipc, "linspace", left_out=1, by_log_snr=True, whole_labels=True
    ),
    "LCMScheduler": _Kind(_lcm, "", distilled=True),
    "TCDScheduler": _Kind(_tcd, "", distilled=True),
}
_FLOW = "FlowMatchEulerDiscreteScheduler"
_TARGETS = {"epsilon": "noise", "v_prediction": "v", "sample": "clean"}
_PATHS: Mapping[str, Any] = {
    "linear": beta_tables.LinearBetas,
    "scaled_linear": beta_tables.ScaledLinearBetas,
    "squaredcos_cap_v2": beta_tables.CosineBetas,
}
_NO_SIGMAS: Mapping[str, tuple[Any, ...]] = {
    f"use_{name}": (False, None) for name in ("exponential_sigmas", "beta_sigmas")
}
_KNOWN: Mapping[str, tuple[Any, ...]] = {
    **_NO_SIGMAS,
    "use_lu_lambdas": (False, None),
    "use_flow_sigmas": (False, None),
    "trained_betas": (None,),
    "final_sigmas_type": ("zero",),
    "sigma_min": (None,),
    "sigma_max": (None,),
    "interpolation_type": ("linear",),
    "timestep_type": ("discrete",),
    "variance_type": ("fixed_small", "fixed_small_log", "learned_range", None),
    "lambda_min_clipped": (-math.inf, None),
    "predict_x0": (True,),
    "disable_corrector": ([], None),
    "solver_p": (None,),
    "timestep_scaling": (10.0,),
}
"""Entries that change samples, and the values with a meaning here; the first is the default."""
_KNOWN_OF_FLOW: Mapping[str, tuple[Any, ...]] = {
    **_NO_SIGMAS,
    "use_karras_sigmas": (False, None),
    "stochastic_sampling": (False, None),
    "invert_sigmas": (False, None),
    "shift_terminal": (None,),
    "time_shift_type": ("exponential",),
}
_HIGHEST = 1e6
"""Of the noise per unit of signal on Karras' grid: above that of any table, so nothing is cut."""
_LEAST_SIGNAL = 2.0**-12
"""The signal at the last step of a table of zero terminal SNR, as diffusers' solvers have it."""


def schedule_of(
    entries: Entries,
    source: str,
    num_tokens: int = 0,
    uniform: bool = False,
    by_steps: bool = False,
) -> Schedule:
    """What a scheduler's config means here.

    Args:
        entries: the entries of `scheduler_config.json`.
        source: the file, for errors.
        num_tokens: the number of tokens of an image, on which a dynamic shift depends.
        uniform: whether flow matching has the times 1, …, 2/n, 1/n before they are shifted, which
            pipelines of Flux set; else the last one is that of the scheduler, 0.001 as a rule.
        by_steps: whether a dynamic shift depends on the number of steps, as in Flux.2.

    Raises:
        UserError: the class is not known here, or an entry has a value that is not.

    Example:
        >>> schedule_of({"_class_name": "DDIMScheduler", "beta_schedule": "scaled_linear",
        ...     "prediction_type": "v_prediction", "clip_sample": False}, "x").unit_start
        True
    """
    try:
        if entries.get("_class_name") == _FLOW:
            return _flow(entries, num_tokens, uniform, by_steps)
        return _of_table(entries)
    except UserError as error:
        raise UserError(f"{source}: {error}") from error
    except (ArithmeticError, TypeError, ValueError) as error:
        raise UserError(f"{source} can't be used: {error}") from error


def prediction_of(target: ConfigDict) -> str:
    """The `prediction_type` of a target; "" of one that has none.

    Example:
        >>> prediction_of(choices.TARGETS["v"])
        'v_prediction'
    """
    known = {choices.TARGETS[ours][TARGET]: theirs for theirs, ours in _TARGETS.items()}
    return known.get(target[TARGET], "")


def _of_table(entries: Entries) -> Schedule:
    name = str(entries.get("_class_name", ""))
    kinds = (*_KINDS, _FLOW)
    if name not in _KINDS:
        raise UserError(f"no scheduler is called {name!r} here; {nearest(name, kinds)}")
    kind = _KINDS[name]
    spacing = str(entries.get("timestep_spacing", kind.spacing))
    prediction = str(entries.get("prediction_type", "epsilon"))
    if prediction not in _TARGETS:
        raise UserError(f"prediction_type: {prediction!r}; {nearest(prediction, _TARGETS)}")
    karras = bool(entries.get("use_karras_sigmas"))
    _check_known(name, entries, _KNOWN)
    if kind.left_out and karras and _solver(kind, entries).get("order") == 3:
        raise UserError(f"{name} of order 3 on Karras' grid is not known here")
    solver = _solver(kind, entries)
    if kind.keeps_noise and not entries.get("set_alpha_to_one", name == "DDIMScheduler"):
        solver = spec(solvers.unfinished, solver=solver)
    zero = bool(entries.get("rescale_betas_zero_snr"))
    label = choices.copy(choices.NOISE_LABELS["step"])
    label.scale = float(_num_steps(entries))
    label.whole = kind.whole_labels and karras
    return Schedule(
        path=_path({"beta_schedule": kind.table, **entries}, zero, kind.by_log_snr),
        target=choices.copy(choices.TARGETS[_TARGETS[prediction]]),
        noise_label=label,
        solver=solver,
        grid=_grid(spacing, kind, entries),
        unit_start=not kind.scaled or spacing == "leading",
        guidance=_guidance(kind, entries),
        distilled=kind.distilled,
    )


def _guidance(kind: _Kind, entries: Entries) -> ConfigDict:
    """The rule of guidance, with what is done to its x0.

    Thresholding divides x0 by a quantile, which is cut to [1, sample_max_value]. At 1 that is
    clipping.
    """
    limit = None
    if entries.get("thresholding"):
        largest = float(entries.get("sample_max_value", 1.0))
        if largest < 1.0:
            raise UserError(f"sample_max_value={largest:g} is below 1, which is not known here")
        if largest > 1.0:
            rule = lookup.guidance_called("cfg+thresholded")
            rule.quantile = float(entries.get("dynamic_thresholding_ratio", 0.995))
            rule.largest = largest
            return rule
        limit = 1.0
    elif entries.get("clip_sample", kind.clips):
        limit = float(entries.get("clip_sample_range", 1.0))
    if limit is None:
        return lookup.guidance_called("cfg")
    rule = lookup.guidance_called("cfg+clipped")
    rule.limit = limit
    return rule


def _check_known(name: str, entries: Entries, known: Mapping[str, tuple[Any, ...]]) -> None:
    """Refuses entries of values that have no meaning here."""
    for entry, values in known.items():
        if entry in entries and entries[entry] not in values:
            raise UserError(
                f"{name} with {entry}={entries[entry]!r} is not known here; {values[0]!r} is"
            )


def _solver(kind: _Kind, entries: Entries) -> ConfigDict:
    if callable(kind.solver):
        return kind.solver(entries)
    return choices.copy(choices.SOLVERS[kind.solver])


def _num_steps(entries: Entries) -> int:
    return int(entries.get("num_train_timesteps", 1000))


def _path(entries: Entries, zero_snr: bool, by_log_snr: bool) -> ConfigDict:
    name, number = str(entries.get("beta_schedule", "linear")), _num_steps(entries)
    if name not in _PATHS:
        raise UserError(f"beta_schedule: {name!r} is not known here; {nearest(name, _PATHS)}")
    how: dict[str, Any] = {"num_steps": number, "t_min": 1.0 / number, "t_noise": 1.0}
    if name != "squaredcos_cap_v2":
        how["beta_start"] = float(entries.get("beta_start", 0.0001))
        how["beta_end"] = float(entries.get("beta_end", 0.02))
    path = spec(_PATHS[name], **how)
    if not zero_snr:
        return path
    floor = _LEAST_SIGNAL if by_log_snr else 0.0
    return spec(shifts.ZeroTerminalSNR, path=path, kept_at=1.0 / number, floor=floor)


def _grid(spacing: str, kind: _Kind, entries: Entries) -> ConfigDict:
    number = _num_steps(entries)
    if kind.distilled:
        distilled = int(entries.get("original_inference_steps", 50))
        if not 1 <= distilled <= number:
            raise UserError(f"original_inference_steps={distilled} is to be from 1 to {number}")
        return spec(grids.Subset, num_train_steps=number, num_distilled=distilled)
    if entries.get("use_karras_sigmas"):
        return spec(grids.Karras, highest=_HIGHEST)
    known = {
        "leading": lambda: spec(
            grids.Leading,
            num_train_steps=number,
            offset=int(entries.get("steps_offset", 0)),
            left_out=kind.left_out,
        ),
        "linspace": lambda: spec(
            grids.Linspace,
            num_train_steps=number,
            left_out=kind.left_out,
            whole=kind.whole_steps,
        ),
        "trailing": lambda: spec(grids.Trailing, num_train_steps=number),
    }
    if spacing not in known:
        raise UserError(f"timestep_spacing: {spacing!r}; {nearest(spacing, known)}")
    return known[spacing]()


def _flow(entries: Entries, num_tokens: int, uniform: bool, by_steps: bool) -> Schedule:
    """Flow matching: Euler's steps on the linear path, with times shifted towards noise."""
    _check_known(_FLOW, entries, _KNOWN_OF_FLOW)
    number = _num_steps(entries)
    least = 1.0 / number
    shift: float | None = None
    if entries.get("use_dynamic_shifting") and by_steps:
        pass  # It is the grid's, which knows the number of steps.
    elif entries.get("use_dynamic_shifting"):
        shift = dynamic_shift(entries, num_tokens)
    else:
        shift = float(entries.get("shift", 1.0))
        # The smallest of the shifted times is shifted again, with all others.
        least = shifts.shifted(least, shift)
    times = spec(grids.Power) if uniform else spec(grids.DownTo, least=least)
    label = spec(precond.TimeLabel, scale=float(number))
    return Schedule(
        path=choices.copy(choices.PATHS["linear"]),
        target=choices.copy(choices.TARGETS["velocity"]),
        noise_label=label,
        solver=choices.copy(choices.SOLVERS["euler"]),
        grid=spec(grids.Shifted, grid=times, shift=shift)
        if shift is not None
        else spec(grids.ShiftedBySteps, grid=times, num_tokens=num_tokens),
        guidance=lookup.guidance_called("cfg"),
    )


def dynamic_shift(entries: Entries, num_tokens: int) -> float:
    """The shift of an image's times: `exp(mu)`, with mu linear in the number of its tokens.

    Example:
        >>> dynamic_shift({}, 256) == math.exp(0.5)
        True
    """
    few, many = entries.get("base_image_seq_len", 256), entries.get("max_image_seq_len", 4096)
    low, high = entries.get("base_shift", 0.5), entries.get("max_shift", 1.15)
    return math.exp(low + (high - low) * (num_tokens - few) / (many - few))
