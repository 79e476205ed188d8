"""Other ways to run the same config: which of them is best, and what would fit."""

from collections.abc import Callable, Iterator, Sequence

from ml_collections import ConfigDict

from diffjax.models.remat import REMAT
from diffjax.performance.planning.compiled import Needs
from diffjax.performance.planning.roofline import estimate
from diffjax.performance.planning.topologies import GIB, Topology, slices, topology_called
from diffjax.training.sharding import filled

Row = tuple[str, ConfigDict, Needs]
AXES = ("mesh", "remat", "scan")
"""What a search varies."""


def changed(config: ConfigDict, **values: object) -> ConfigDict:
    """A copy of a config with other values, by dotted names with `__` for the dots.

    Example:
        >>> changed(ConfigDict({"model": {"scan": False}}), model__scan=True).model.scan
        True
    """
    copy = ConfigDict(config.to_dict())
    for name, value in values.items():
        *groups, key = name.split("__")
        group = copy
        for part in groups:
            group = group[part]
        group[key] = value
    return copy


def meshes(
    num_chips: int, batch_size: int, num_slices: int = 1, *, tensor: int = 1, sequence: int = 1
) -> list[dict[str, int]]:
    """Ways to split a batch and parameters: all over `fsdp`, groups no smaller than their number,
    or copies; no group goes across slices.

    Example:
        >>> [mesh["fsdp"] for mesh in meshes(256, 256)]
        [256, 128, 64, 32, 16, 1]
        >>> [(mesh["data"], mesh["fsdp"]) for mesh in meshes(16, 16, num_slices=2, tensor=2)]
        [(2, 4), (4, 2), (8, 1)]
    """
    rows = num_chips // (tensor * sequence)
    within = rows // num_slices
    divisors = [n for n in range(1, within + 1) if within % n == 0]
    sizes = {within} if batch_size % rows else {1, *(n for n in divisors if n * n >= within)}
    return [
        {"data": rows // fsdp, "fsdp": fsdp, "tensor": tensor, "sequence": sequence}
        for fsdp in sorted(sizes, reverse=True)
    ]


def candidates(
    config: ConfigDict, topology: Topology, over: Sequence[str] = AXES
) -> Iterator[tuple[str, ConfigDict]]:
    """Sharding × rematerialisation × scan: what each is called, and its config.

    The mesh's `tensor` and `sequence` are as the config has them, and `tensor` is 2 once besides.

    Args:
        config: resolved.
        topology: the chips.
        over: which of `AXES` are varied; the others are as the config has them.
    """
    model = config.model
    policies = tuple(REMAT) if "remat" in over and "remat" in model else (model.get("remat"),)
    scans = (True, False) if "scan" in over and "scan" in model else (model.get("scan"),)
    own = _filled(config, topology)
    for mesh in _meshes_of(config, own, topology) if "mesh" in over else [own]:
        for policy in policies:
            for scan in scans:
                others = [axis for axis in ("tensor", "sequence") if mesh[axis] > 1]
                parts = [f"{axis}={mesh[axis]}" for axis in ("data", "fsdp", *others)]
                values: dict[str, object] = {f"mesh__{axis}": size for axis, size in mesh.items()}
                if policy is not None:
                    values["model__remat"] = policy
                    parts.append(f"remat={policy}")
                if scan is not None:
                    values["model__scan"] = scan
                    parts.append(f"scan={scan}")
                yield " ".join(parts), changed(config, **values)


def _meshes_of(config: ConfigDict, own: dict[str, int], topology: Topology) -> list[dict[str, int]]:
    chips, slices, batch = topology.num_chips, topology.copies, config.batch_size
    found = meshes(chips, batch, slices, tensor=own["tensor"], sequence=own["sequence"])
    if own["tensor"] == own["sequence"] == 1 and topology.slice_size % 2 == 0:
        found += meshes(chips, batch, slices, tensor=2)[:1]
    return found


def _filled(config: ConfigDict, topology: Topology) -> dict[str, int]:
    """The config's own mesh, with numbers for -1."""
    return filled(config.mesh, topology.num_chips, topology.num_slices)


def best(rows: Sequence[Row]) -> Row | None:
    """Of those that fit, the one with most images per second, then with least memory."""
    fitting = [row for row in rows if row[2].fits]
    if not fitting:
        return None

    def cost(row: Row) -> tuple[float, int]:
        _, _, needs = row
        seconds = estimate(needs, topology_called(needs.topology)).seconds
        # A difference below a thousandth is none.
        return round(1e3 * seconds / needs.batch_size, 6), needs.peak_bytes

    return min(fitting, key=cost)


def largest_batch(
    config: ConfigDict,
    topology: Topology,
    plan: Callable[[ConfigDict], Needs],
    most_plans: int = 6,
) -> Iterator[tuple[ConfigDict, Needs]]:
    """Plans batches until it is known which is the largest that fits.

    Memory is all but a straight line in the batch size: two batches say where it meets what the
    chip has, and further ones make sure of it.

    Args:
        config: resolved; its batch size is the first that is tried.
        topology: the chips.
        plan: what a config needs.
        most_plans: after so many the search ends.

    Yields:
        Each config that was tried, with its needs.
    """
    step = _rows(config, topology)
    first = max(step, config.batch_size // step * step)
    tried: dict[int, Needs] = {}
    following = first
    while following not in tried and len(tried) < most_plans:
        candidate = changed(config, batch_size=following)
        tried[following] = plan(candidate)
        yield candidate, tried[following]
        following = _next(tried, step, topology.usable_bytes)


def _next(tried: dict[int, Needs], step: int, memory: int) -> int:
    """The batch to try next; one that was tried already ends the search."""
    peaks = {batch: needs.peak_bytes for batch, needs in tried.items()}
    fitting = [batch for batch, needs in tried.items() if needs.fits]
    too_large = [batch for batch, needs in tried.items() if not needs.fits]
    lowest = max(fitting, default=0)
    highest = min(too_large, default=0)
    if len(peaks) == 1:
        (batch,) = tried
        other = batch / 2 if too_large else 2 * batch
        return max(step, round(other / step) * step)
    low, *_, high = sorted(peaks)
    slope = max((peaks[high] - peaks[low]) / (high - low), 1e-9)
    guess = int((memory - peaks[low]) / slope + low) // step * step
    if highest:
        guess = min(guess, highest - step)
    # A batch that is known to fit is not tried again: the next one makes sure.
    guess = max(guess, lowest + step)
    return guess if not highest or guess < highest else lowest


def largest(rows: Sequence[Row]) -> Row | None:
    """The largest batch that fits, of those that were tried."""
    fitting = [row for row in rows if row[2].fits]
    return max(fitting, key=lambda row: row[2].batch_size, default=None)


def about_largest(rows: Sequence[Row], topology: Topology) -> str:
    """A line that says which batch is the largest that fits, and how far that is known."""
    found = largest(rows)
    too_large = min((n.batch_size for _, _, n in rows if not n.fits), default=None)
    if found is None:
        return f"largest batch that fits: none; {too_large} does not"
    _, config, needs = found
    line = f"largest batch that fits: {needs.batch_size}"
    if too_large is None:
        return f"{line}, or more: after {len(rows)} plans nothing larger was tried"
    if too_large - needs.batch_size > _rows(config, topology):
        return f"{line}, or more: {too_large} does not, and {len(rows)} plans were made"
    return f"{line}; {too_large} does not"


def _rows(config: ConfigDict, topology: Topology) -> int:
    """What a batch has to be a multiple of: the devices among which it is split, for each part."""
    sizes = _filled(config, topology)
    return sizes["data"] * sizes["fsdp"] * config.get("accumulation_steps", 1)


def what_would_fit(config: ConfigDict, needs: Needs) -> str:
    """A line about a program that does not fit, with what would, as far as can be told from it."""
    topology = topology_called(needs.topology)
    have, fixed = topology.usable_bytes, needs.state_bytes
    line = (
        f"{config.name} at batch {needs.batch_size} needs {needs.peak_bytes / GIB:.2f} GiB a chip "
        f"of {needs.topology}, which has {have / GIB:.2f}: "
    )
    would = []
    rest = needs.peak_bytes - fixed
    rows = _rows(config, topology)
    batch = int(needs.batch_size * (have - fixed) / rest) // rows * rows if rest > 0 else 0
    if 0 < batch < needs.batch_size:
        would.append(f"--config.batch_size={batch}")
    for larger in slices(topology.chip):
        if needs.peak_bytes * topology.num_chips <= have * larger.num_chips:
            would.append(f"--topology={larger.name}")
            break
    if config.model.get("remat", "full") != "full":
        would.append("--config.model.remat=full")
    others = needs.mesh.get("tensor", 1) * needs.mesh.get("sequence", 1) * topology.copies
    if needs.mesh["fsdp"] < topology.num_chips // others:
        would.append(
            f"--config.mesh.data={topology.copies} "
            f"--config.mesh.fsdp={topology.num_chips // others}"
        )
    return line + (f"try {', or '.join(would)}" if would else "it takes larger chips")
