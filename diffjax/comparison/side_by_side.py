"""A table of all metrics of runs at their own recipes, where provenances agree."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from diffjax.comparison.provenance import check_comparable
from diffjax.comparison.results import RunFiles, SweepFiles
from diffjax.comparison.verdicts import finite, mean_interval
from diffjax.errors import UserError
from diffjax.evaluation.tables import LABELS, is_number, label, percent, range_of, three_digits

_SHARES = ("accuracy", "retrieval_accuracy", "copied", "inauthentic")
_OF_NEIGHBOURS = ("closer_than_test", "copied", "inauthentic", "data_copying")
# Results and weights of a likelihood; the other entries describe how it was computed.
_NOT_HOW = (
    "bits_per_dim", "standard_error", "estimator_error", "coarser_steps_change", "nfe", "step",
    "weights", "seconds",
)  # fmt: skip


def entries(run: RunFiles) -> dict[str, Mapping[str, Any]]:
    """The metrics of a run by name, each with `value` and possibly `floor` and `provenance`.

    Metrics on extractors other than the first have names `name (extractor)`, bits per dimension
    `bits_per_dim (method-dequantisation)`.
    """
    found = dict(_of(run.evaluation))
    for extractor, numbers in _mappings(run.evaluation.get("extractors")):
        found |= {f"{name} ({extractor})": entry for name, entry in _of(numbers)}
    for method, result in _mappings(run.likelihood):
        how = {key: value for key, value in result.items() if key not in _NOT_HOW}
        found[f"bits_per_dim ({method})"] = {
            "value": result.get("bits_per_dim"),
            "provenance": how,
        }
    return {name: entry for name, entry in found.items() if is_number(entry.get("value"))}


def metric_rows(files: SweepFiles) -> list[dict[str, Any]]:
    """One row for each metric that any run has.

    Returns:
        For each metric `name, label, is_share`, `incomparable` (the reason why it is not compared,
        or ""), `floor` (None if runs have no floor or different ones) and `arms`: for each arm the
        interval over training seeds with its `values`, or None.
    """
    every = {run.name: entries(run) for run in files.runs}
    names = sorted({name for found in every.values() for name in found}, key=_place)
    rows = []
    for name in names:
        try:
            check_comparable(every, name)
            incomparable = ""
        except UserError as error:
            incomparable = str(error)
        floors = {found[name].get("floor") for found in every.values() if name in found}
        floor = next(iter(floors)) if len(floors) == 1 else None
        rows.append(
            {
                "name": name,
                "label": label(name),
                "is_share": _kind(name) in _SHARES,
                "incomparable": incomparable,
                "floor": floor if is_number(floor) and not incomparable else None,
                "arms": {
                    arm: None if incomparable else _over_seeds(files.of(arm), every, name)
                    for arm in files.arms
                },
            }
        )
    return rows


def own_recipes(files: SweepFiles) -> dict[str, str]:
    """The sampling recipe of each arm's metrics as text; "" if it is not known."""
    found = {}
    for arm in files.arms:
        texts = {_recipe(run) for run in files.of(arm) if run.evaluation.get("sampling")}
        found[arm] = "; or ".join(sorted(texts))
    return found


def metric_table(rows: Sequence[Mapping[str, Any]], arms: Sequence[str]) -> list[list[str]]:
    """Formats rows as text: the label, a cell for each arm, the floor."""
    lines = []
    for row in rows:
        write = percent if row["is_share"] else three_digits
        cells = [_cell(row["arms"][arm], write) for arm in arms]
        if row["incomparable"]:
            cells = ["not compared" for _ in arms]
        floor = "" if row["floor"] is None else write(row["floor"])
        lines.append([row["label"], *cells, floor])
    return lines


def _of(evaluation: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    for name, entry in evaluation.items():
        if isinstance(entry, Mapping) and "value" in entry:
            yield name, entry
    yield (
        "accuracy",
        {
            "value": evaluation.get("accuracy"),
            "floor": evaluation.get("classifier_test_accuracy"),
            "provenance": evaluation.get("accuracy_provenance"),
        },
    )
    neighbours = evaluation.get("neighbours")
    if isinstance(neighbours, Mapping):
        for name in _OF_NEIGHBOURS:
            floor = neighbours.get(f"{name}_floor")
            how = neighbours.get("provenance")
            yield name, {"value": neighbours.get(name), "floor": floor, "provenance": how}


def _mappings(tree: Any) -> Iterator[tuple[str, Mapping[str, Any]]]:
    items = tree.items() if isinstance(tree, Mapping) else ()
    return ((str(name), inner) for name, inner in items if isinstance(inner, Mapping))


def _kind(name: str) -> str:
    return name.partition(" (")[0]


def _place(name: str) -> tuple[str, int, str]:
    """Sort key of a metric: first extractor first, then in the order of `LABELS`."""
    order = list(LABELS)
    kind, _, rest = name.partition(" (")
    rest = "" if kind == "bits_per_dim" else rest
    return rest, order.index(kind) if kind in order else len(order), name


def _over_seeds(
    runs: Sequence[RunFiles], every: Mapping[str, Mapping[str, Mapping[str, Any]]], name: str
) -> dict[str, Any] | None:
    values = [float(every[run.name][name]["value"]) for run in runs if name in every[run.name]]
    if not values:
        return None
    interval = mean_interval(values, bounds=range_of(name))
    return {
        **{key: finite(value) for key, value in interval._asdict().items()},
        "values": values,
    }


def _recipe(run: RunFiles) -> str:
    sampling = run.evaluation["sampling"]
    scale = sampling.get("guidance_scale")
    parts = [
        str(sampling.get("solver")),
        f"{sampling.get('num_steps')} steps",
        f"NFE {sampling.get('nfe')}",
        f"{sampling.get('grid_name')} grid",
        f"guidance {scale:g}" if is_number(scale) else "",
        str(run.evaluation.get("weights", "")),
    ]
    return ", ".join(part for part in parts if part)


def _cell(one: Mapping[str, Any] | None, write: Any) -> str:
    if one is None:
        return write(None)
    text = write(one["mean"])
    return text if one["low"] is None else f"{text} ({write(one['low'])} to {write(one['high'])})"
