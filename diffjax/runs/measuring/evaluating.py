"""Evaluates a run by the names of the flags of `experiments.evaluate`: what `run.evaluate` does."""

from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from diffjax.data import DataSet
from diffjax.errors import UserError, nearest
from diffjax.evaluation.extractors.features import Extractor
from diffjax.evaluation.extractors.named import extractor_called
from diffjax.host.processes import in_first, is_first
from diffjax.runs import workdirs
from diffjax.runs.load import Run
from diffjax.runs.measuring.measure import Wanted, measure
from diffjax.runs.measuring.results import elsewhere

_FLAGS = {"guidance_scale": "guidance_scales", "seed": "seeds", "extractor": "extractors"}
"""Flags whose settings in a config are lists, with names of their own."""
_ALONE = ("num_samples", "labels", "prompts", "batch_size", "guidance", "against")


def evaluate_run(
    run: Run,
    dataset: DataSet | None = None,
    *,
    data_path: str | None = None,
    out: str | Path | None = None,
    **wanted: Any,
) -> dict[str, Any]:
    """Evaluates a run, and writes `evaluation.json` and the page; `Run.evaluate` explains it.

    Raises:
        UserError: as `diffjax.runs.measuring.measure.measure`; an unknown setting; a published
            network without `out`.
    """
    settings = wanted_of(wanted)
    if out is None and not (run.workdir / workdirs.CONFIG).exists():
        raise UserError(f"{run.workdir} is no folder of a run: name one for the results, as out=")
    dataset = dataset or run.dataset(data_path)
    if out is not None:
        run = elsewhere(run, out)
    if not (run.workdir / workdirs.CONFIG).exists():  # of a published network
        in_first(lambda: workdirs.claim(run.workdir, run.config))
        workdirs.record_run(run.workdir, run.parts, dataset, "run.evaluate(…) in Python")
    result = measure(run, dataset, settings)
    if is_first():
        # Imported here: Matplotlib takes seconds to load.
        from diffjax.reports.run_page import write_report

        write_report(run.workdir)
    return result


def wanted_of(given: dict[str, Any]) -> Wanted:
    """What is to be evaluated, by names of flags or of `Wanted`; one value is a list of one.

    Raises:
        UserError: an unknown name, one that is given twice, or a value of another kind.

    Example:
        >>> wanted_of({"solvers": "ddim", "guidance_scale": 2.0}).guidance_scales
        (2.0,)
    """
    known = [field.name for field in fields(Wanted)]
    found: dict[str, Any] = {}
    for name, value in given.items():
        setting = _FLAGS.get(name, name)
        if setting not in known:
            raise UserError(f"evaluate has no setting {name!r}; {nearest(name, [*known, *_FLAGS])}")
        if setting in found:
            raise UserError(
                f"{setting} is given twice, once by the name of the flag: leave one out"
            )
        listed = isinstance(value, Sequence) and not isinstance(value, str)
        single = value is None or setting in _ALONE or listed
        found[setting] = value if single else (value,)
    extractors = found.get("extractors")
    if extractors is not None:
        found["extractors"] = tuple(_extractor(each) for each in extractors)
    return Wanted(**found)


def _extractor(given: Any) -> Extractor:
    return extractor_called(given) if isinstance(given, str) else given
