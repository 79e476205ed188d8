"""Initial weights of a fresh run: another run's, or those of a published file."""

import difflib
import hashlib
from collections.abc import Callable, Collection, Mapping
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from diffjax.errors import UserError, nearest
from diffjax.host.processes import to_host
from diffjax.host.run_files import read_json
from diffjax.models.families import LAYOUTS, layout_of
from diffjax.models.low_rank import lora_layers, without_lora
from diffjax.objectives.repa import PROJECTOR
from diffjax.pretrained.family import Denoiser
from diffjax.pretrained.folders import is_folder, read_weights
from diffjax.pretrained.placing import placed_like
from diffjax.pretrained.tensors import finite
from diffjax.runs.checkpoints import Checkpoints, Damaged
from diffjax.training.sharding import replicated
from diffjax.training.state import TrainState

Initial = Callable[[], tuple[Any, dict[str, Any]]]
"""`() -> (params, source)` reads weights that were found and that fit: arrays in the network's
shardings, and where they come from as plain data: `folder`, `weights` and `step` of a run, `file`
of a published file and what of it is `left_out`, and `sha256` of the weights."""


def find_initial_weights(
    named: str,
    like: Any,
    setting: str = "config.init_from",
    denoiser: Denoiser | None = None,
    own_names: Collection[str] = (),
) -> Initial:
    """Finds weights by name, and compares their names and shapes with those of the network.

        config.init_from = "runs/digits"              # the weights that this run is evaluated with
        config.init_from = "runs/digits:live"         # or an average: "runs/digits:ema-0.999"
        config.init_from = "weights.safetensors"      # or a file of torch.save
        config.init_from = "DiT-XL-2-256/transformer" # or a folder of diffusers, or a pipeline

    The arrays of a run are not read yet. Of a file, each tensor has the path of its parameter as
    name, joined by `.` or `/`, as `block_0.attention.qkv.kernel`; or all have the names of one of
    the layouts of the network (`diffjax.models.families`). The settings of the network are not
    changed: those of diffusers' DiT differ from those of its authors. What the objective trains
    beside the network, the embedding of a scale of guidance and LoRA may be missing, and the
    projector of REPA may be left over; in the layouts of published networks all that an objective
    adds may be missing, such as the embedding of a second time.

    Args:
        named: the folder of a run, `FOLDER:weights`, a file of torch or safetensors, or a folder of
            diffusers.
        like: the network's parameters as `ShapeDtypeStruct` with shardings.
        setting: the setting that names them, for errors.
        denoiser: the network, whose family knows the authors' names.
        own_names: the names of what the objective trains beside the network (`Wired.own_names`) or
            adds to it (`Wired.embedding_names`). These may be missing.

    Raises:
        UserError: there is nothing of that name, it is damaged, or a parameter is missing, left
            over or of another shape.
    """
    folder, colon, weights = named.rpartition(":")
    if is_run(Path(named)):
        return _of_run(Path(named), "", like, setting, own_names)
    if Path(named).is_file() or is_folder(Path(named)):
        return _of_file(Path(named), like, setting, denoiser, own_names)
    if colon and is_run(Path(folder)):
        return _of_run(Path(folder), weights, like, setting, own_names)
    raise UserError(
        f"{setting}={named!r} is neither a file nor the folder of a run or of diffusers: name "
        "one, or FOLDER:weights, as runs/digits:ema-0.999"
    )


def is_run(folder: Path) -> bool:
    """Whether a folder is that of a run."""
    return (folder / "config.json").is_file() and (folder / "checkpoints").is_dir()


def _of_run(
    folder: Path, weights: str, like: Any, setting: str, own_names: Collection[str]
) -> Initial:
    """Weights of the newest whole checkpoint, read into their shardings and nothing else."""
    config = read_json(folder / "config.json") or {}
    weights = weights or str(config.get("weights"))
    with closing(Checkpoints(folder / "checkpoints", read_only=True)) as checkpoints:
        shapes = _newest_shapes(checkpoints, setting)
    try:
        found = shapes.weights(weights)
    except UserError as error:
        raise UserError(f"{setting}={folder}: {error}") from None
    if lora_layers(found) and not lora_layers(like):
        raise UserError(
            f"{setting}={folder} has LoRA, which this network has not: set --config.lora.rank, or "
            f"merge it by experiments.convert --from={folder} --to=diffjax, and begin with that"
        )
    check_same(f"{setting}={folder}", *_same_extras(found, like, own_names))
    wanted = placed(shapes, like).only(weights)

    def read() -> tuple[Any, dict[str, Any]]:
        with closing(Checkpoints(folder / "checkpoints", read_only=True)) as checkpoints:
            restored = checkpoints.restore(wanted, set_damaged_aside=False)
        if restored is None:
            raise UserError(f"{setting}={folder}: its checkpoints are gone")
        state, meta = restored
        params, kept = _same_extras(state.weights(weights), like, own_names)
        params = jax.tree.map(lambda x, y: x.astype(y.dtype), params, kept)
        source = {"folder": str(folder), "weights": weights, "step": meta["step"]}
        return params, source | {"sha256": weights_sha256(params)}

    return read


def _newest_shapes(checkpoints: Checkpoints, setting: str) -> TrainState:
    """The shapes in the newest checkpoint whose metadata can be read."""
    damage = None
    for step in reversed(checkpoints.steps()):
        try:
            return checkpoints.shapes(step)
        except Damaged as error:
            damage = error
    raise UserError(f"{setting}: {damage or f'{checkpoints.folder} has no checkpoint yet'}")


def placed(shapes: TrainState, like: Any) -> TrainState:
    """A state's shapes with the shardings of the network's parameters of the same names."""
    where = {name: leaf.sharding for name, leaf in by_path(like).items()}
    mesh = next(iter(where.values())).mesh

    def place(path: tuple, leaf: Any) -> jax.ShapeDtypeStruct:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        place = where.get(name, replicated(mesh))
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place)

    there = partial(jax.tree_util.tree_map_with_path, place)
    averages = {name: there(average) for name, average in shapes.ema.items()}
    return shapes._replace(
        step=there(shapes.step),
        params=there(shapes.params),
        ema=averages,
        frozen=there(shapes.frozen),
    )


def _of_file(
    path: Path,
    like: Any,
    setting: str,
    denoiser: Denoiser | None,
    own_names: Collection[str],
) -> Initial:
    where, state = f"{setting}={path}", read_weights(path).state
    arrays = {name.replace(".", "/"): tensor for name, tensor in state.items()}
    roots = {name.split("/")[0]: None for name in arrays}
    _, like = _same_extras({**roots, **arrays}, like, own_names)
    here = by_path(like)
    place, facts = placed_like(like), {"file": str(path)}
    layouts = LAYOUTS.get(type(denoiser.network), {}) if denoiser else {}
    # Some names of diffusers are those of parameters here, such as `conv_in/bias`.
    layout = layout_of(state, layouts)
    if denoiser and layouts and (layout or arrays.keys().isdisjoint(here)):
        family = layouts[layout or next(iter(layouts))]
        fitting = family.without_variance(state, denoiser)
        facts |= {} if fitting is state else {"left_out": "learned variance"}
        family.check(fitting, denoiser, where)
        shapes = by_path(family.shapes(denoiser))
        # What an objective adds to the network begins fresh, such as the embedding of a second
        # time.
        check_same(where, shapes, {name: x for name, x in here.items() if name in shapes})
        weights = partial(family.to_ours, fitting, denoiser, where, place)
    else:
        check_same(where, arrays, like)
        for name, array in arrays.items():
            if not jnp.issubdtype(array.dtype, jnp.floating):  # quantised, for example
                raise UserError(
                    f"{where}: {name} has the type {array.dtype}, and weights are floats"
                )

        def weights() -> Any:
            read = {name: finite(name, arrays[name], where) for name in here}
            found = {name: place(name, np.asarray(tensor)) for name, tensor in read.items()}
            return traverse_util.unflatten_dict(found, sep="/")

    def read() -> tuple[Any, dict[str, Any]]:
        params = weights()
        return params, {**facts, "sha256": weights_sha256(params)}

    return read


def _same_extras(found: Any, like: Any, own_names: Collection[str]) -> tuple[Any, Any]:
    """Both trees, without the projector of REPA unless both have one: it serves training alone.

    The second is without LoRA, and without what the objective trains beside the network, if the
    first is; LoRA that is found is not left out.
    """
    like = like if lora_layers(found) else without_lora(like)
    here = by_path(found)
    missing = [n for n in (*own_names, PROJECTOR) if n not in found and n not in here]
    left_over = {PROJECTOR} - like.keys()
    return (
        {name: x for name, x in found.items() if name not in left_over},
        without(like, missing),
    )


def without(tree: Any, names: Collection[str]) -> Any:
    """A tree of parameters without those of these paths, and without what is under them.

    Example:
        >>> without({"a": {"b": 1, "c": 2}, "d": {"e": 3}}, ("a/b", "d"))
        {'a': {'c': 2}}
    """
    flat = traverse_util.flatten_dict(tree, sep="/")
    kept = {n: x for n, x in flat.items() if not any(f"{n}/".startswith(f"{s}/") for s in names)}
    return traverse_util.unflatten_dict(kept, sep="/")


def check_same(where: str, found: Any, like: Any) -> None:
    """Refuses weights whose names and shapes are not those of a network.

    Args:
        where: what to call them, with the setting that names them.
        found: a tree of arrays or shapes.
        like: the network's.

    Raises:
        UserError: the first parameter that is missing, left over or of another shape.

    Example:
        >>> check_same("config.init_from=old", {"w": np.zeros(3)}, {"w": np.zeros(2)})
        Traceback (most recent call last):
        ...
        diffjax.errors.UserError: config.init_from=old: w is [3] there and [2] in this network
    """
    there, here = by_path(found), by_path(like)
    for name in sorted({*there, *here}):
        if name not in there:
            raise UserError(
                f"{where} has no parameter {name} {_shape(here[name])}, which this "
                f"network has{_near(name, there)}"
            )
        if name not in here:
            raise UserError(
                f"{where} has a parameter {name} {_shape(there[name])}, which this "
                f"network has not{_near(name, here)}"
            )
        if there[name].shape != here[name].shape:
            raise UserError(
                f"{where}: {name} is {_shape(there[name])} there and "
                f"{_shape(here[name])} in this network"
            )


def _near(name: str, known: Mapping[str, Any]) -> str:
    close = difflib.get_close_matches(name, known, n=1)
    return f"; {nearest(name, close)}" if close else ""


def _shape(leaf: Any) -> str:
    return str(list(leaf.shape))


def by_path(tree: Any) -> dict[str, Any]:
    """The leaves of a tree by their paths, as `block_0/attention/qkv/kernel`."""
    leaves: Mapping = dict(jax.tree_util.tree_leaves_with_path(tree))
    name = partial(jax.tree_util.keystr, simple=True, separator="/")
    return {name(path): leaf for path, leaf in leaves.items()}


def weights_sha256(params: Any) -> str:
    """A SHA-256 of names, types, shapes and values; it does not depend on the mesh.

    Example:
        >>> one = weights_sha256({"w": np.zeros(2)})
        >>> one == weights_sha256({"w": np.zeros(2)}), one == weights_sha256({"v": np.zeros(2)})
        (True, False)
    """
    known = hashlib.sha256()
    for name, leaf in sorted(by_path(params).items()):
        array = np.ascontiguousarray(to_host(leaf))
        known.update(f"{name} {array.dtype} {array.shape} ".encode())
        known.update(array.tobytes())
    return known.hexdigest()
