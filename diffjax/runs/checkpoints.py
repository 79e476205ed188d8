"""Checkpoints by Orbax, with digests that verify each array when it is read.

Orbax does not notice flipped bits in array data, so each checkpoint carries one 32-bit digest per
array. It is computed on the device, does not depend on the mesh, and changes with any single bit.
"""

import hashlib
import json
import logging
from collections.abc import Mapping
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from jax import Array

from diffjax.errors import UserError
from diffjax.host import processes, storage
from diffjax.training.state import TrainState

_LOG = logging.getLogger("diffjax")
_FROZEN = "frozen"
_UNREAD = ocp.PLACEHOLDER  # which is `...`


class Hindered(UserError):
    """A checkpoint could not be read, for a cause outside of its files; it may be whole."""


class Damaged(UserError):
    """The content of a checkpoint differs from what was saved."""


class _Once(NamedTuple):
    params: Any


class Checkpoints:
    """The checkpoints of one run.

    Frozen parameters are the same in all checkpoints. They are stored once, in the folder `frozen`
    beside this one, under a name made of their digests, which each checkpoint has.

    Args:
        folder: created if it does not exist.
        keep: the number of newest checkpoints that are kept; None keeps all.
        keep_every_steps: checkpoints at multiples of this are kept as well.
        read_only: change nothing, because another process may be writing here.
    """

    def __init__(
        self,
        folder: Path,
        keep: int | None = 3,
        keep_every_steps: int | None = None,
        *,
        read_only: bool = False,
    ):
        self.folder = folder.absolute()
        # Several of one run may write at the same time, and the processes of a run wait for each
        # other by name: with equal names they would take one's barrier for another's.
        barriers = ocp.options.MultiprocessingOptions(barrier_sync_key_prefix=folder.name)
        options = (
            # With Orbax's own `read_only` each use logs three warnings.
            ocp.CheckpointManagerOptions(create=False, multiprocessing_options=barriers)
            if read_only
            else ocp.CheckpointManagerOptions(
                max_to_keep=keep,
                keep_period=keep_every_steps,
                create=True,
                # Unfinished files of killed processes would fill the disk over time.
                cleanup_tmp_directories=True,
                multiprocessing_options=barriers,
            )
        )
        self._read_only = read_only
        handlers = {"state": _handler(), "meta": ocp.JsonCheckpointHandler()}
        self._manager = ocp.CheckpointManager(self.folder, options=options, item_handlers=handlers)

    def save(self, step: int, state: Any, meta: Mapping[str, Any]) -> None:
        """Starts to save: it copies the arrays before it returns, and writes in the background.

        Args:
            step: names the checkpoint; one that exists already is not written again.
            state: a NamedTuple of trees of arrays.
            meta: plain data to store with it.
        """
        # While Grain is imported, all imports of the process, in whichever thread, return modules
        # that are read later (etils' `lazy_imports`): `from math import log` would fail in the
        # threads that write. So it is imported before they begin.
        import grain  # noqa: F401

        if step in self._manager.all_steps():
            return
        content = {**meta, "step": step, "digest": digest(state)}
        content["meta_sha256"] = _sha256(content)
        if name := _name_once(content["digest"]):
            self._once.save(name, _Once(getattr(state, _FROZEN)), {})
            self._once.wait()  # A checkpoint without its frozen parameters is of no use.
        self._manager.save(
            step,
            args=ocp.args.Composite(
                state=ocp.args.PyTreeSave(_parts(state)), meta=ocp.args.JsonSave(content)
            ),
        )

    def restore(
        self, abstract: Any, *, set_damaged_aside: bool = True, newest: int | None = None
    ) -> tuple[Any, dict[str, Any]] | None:
        """Reads the newest undamaged checkpoint, onto the mesh of `abstract`.

        Damaged ones are skipped with a warning.

        Args:
            abstract: as in `read`.
            set_damaged_aside: move damaged ones to a folder beside this one; none is deleted.
            newest: ignore checkpoints of later steps.

        Returns:
            State and meta, or None if there is no checkpoint at all.

        Raises:
            UserError: there are checkpoints and none of them can be read.
            Hindered: one could not be read for a cause outside of its files, such as memory.
        """
        damaged = []
        for step in reversed(self.steps()):
            if newest is not None and step > newest:
                continue
            try:
                restored = self.read(step, abstract)
            except Damaged as error:
                damaged.append(step)
                _LOG.warning("%s", error)
                continue
            if set_damaged_aside:
                self._set_aside(damaged)
            return restored
        if damaged:
            raise UserError(
                f"none of the checkpoints {damaged} in {self.folder} can be read; "
                "restore them from a copy, or start again in another --workdir"
            )
        return None

    def read(self, step: int, abstract: Any) -> tuple[Any, dict[str, Any]]:
        """Reads one checkpoint, or some of its arrays, and verifies their digests.

        Args:
            step: names the checkpoint.
            abstract: the state with a `ShapeDtypeStruct` with sharding for each array, or `...`
                for arrays, or whole parts of the state, that are not read: they are None in the
                result.

        Returns:
            State and meta.

        Raises:
            Damaged: its content differs from what was saved.
            Hindered: it could not be read for a cause outside of its files, such as memory.
        """
        try:
            return self._read(step, abstract)
        except Hindered:
            raise
        except Exception as error:  # All other errors are due to the file.
            if processes.is_loss(error):
                raise
            _raise_if_hindered(step, error)
            raise Damaged(f"checkpoint {step} is damaged: {_first_line(error)}") from error

    def _read(self, step: int, abstract: Any) -> tuple[Any, dict[str, Any]]:
        restored = self._read_together(step, abstract)
        meta = restored.meta
        # Old checkpoints have no such sum.
        if meta.pop("meta_sha256", None) not in (None, _sha256(meta)):
            raise UserError("the data beside the arrays differ from what was saved")
        state = abstract._replace(**restored.state)
        if _FROZEN in getattr(abstract, "_fields", ()):
            frozen = self._read_once(step, getattr(abstract, _FROZEN), meta)
            state = state._replace(**{_FROZEN: frozen})
        state = jax.tree.map(lambda x: None if x is _UNREAD else x, state)
        unread = tuple(f"{name}/" for name, x in _by_name(abstract) if x is _UNREAD)
        actual = digest(state)
        wrong = [
            name
            for name, value in meta["digest"].items()
            if not f"{name}/".startswith(unread) and actual.get(name) != value
        ]
        if wrong or meta["step"] != step:
            raise UserError(f"{len(wrong)} array(s) differ from what was saved, {wrong[:1]} first")
        return state, meta

    def _read_once(self, step: int, abstract: Any, meta: Mapping[str, Any]) -> Any:
        """The frozen parameters of a checkpoint, if any are wanted.

        Raises:
            Hindered: they are damaged or gone. The checkpoint may be whole.
        """
        wanted = [leaf for leaf in jax.tree.leaves(abstract) if leaf is not _UNREAD]
        if not wanted:
            return jax.tree.map(lambda _: None, abstract)
        name = _name_once(meta["digest"])
        try:
            return self._once.read(name, _Once(abstract))[0].params
        except (Damaged, OSError, ValueError) as error:
            if isinstance(error, Hindered):
                raise
            place = self.folder.with_name(_FROZEN) / str(name)
            raise Hindered(
                f"the frozen parameters of checkpoint {step} are damaged or gone: bring {place} "
                f"back from a copy ({_first_line(error)})"
            ) from error

    @cached_property
    def _once(self) -> "Checkpoints":
        folder = self.folder.with_name(_FROZEN)
        return Checkpoints(folder, keep=None, read_only=self._read_only)

    def _read_together(self, step: int, abstract: Any) -> Any:
        """Reads by Orbax; an error of one process is an error of all."""
        arguments = ocp.args.Composite(state=_wanted(_parts(abstract)), meta=ocp.args.JsonRestore())
        restored, trouble = None, None
        try:
            restored = self._manager.restore(step, args=arguments)
        except Exception as error:  # Raised below, after all processes have learned of it.
            trouble = error
        if not processes.all_agree(trouble is None):
            if not processes.all_agree(trouble is None or not hindrance(trouble)):
                raise _hindered(step, hindrance(trouble) or "another process was hindered")
            raise trouble or UserError("another process could not read it")
        return restored

    def shapes(self, step: int) -> TrainState:
        """Names, shapes and types of the arrays in a checkpoint; none of them is read.

        Raises:
            Damaged: its metadata can't be read.
        """
        try:
            parts = self._manager.item_metadata(step)["state"].tree
            known = {name: parts[name] for name in TrainState._fields if name in parts}
            shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), known)
            missing = {"step": (), "params": (), "opt_state": (), "ema": {}}
            state = TrainState(**missing | shapes)
            only_meta = ocp.args.Composite(meta=ocp.args.JsonRestore())
            name = _name_once(self._manager.restore(step, args=only_meta)["meta"]["digest"])
        except Exception as error:
            raise Damaged(f"checkpoint {step} is damaged: {_first_line(error)}") from error
        return state._replace(frozen=self._once.shapes(name).params) if name else state

    def steps(self) -> list[int]:
        """The steps that have a checkpoint, in increasing order."""
        return sorted(self._manager.all_steps())

    def leave(self, steps: list[int]) -> None:
        """Moves checkpoints that no run should resume from to the folder `checkpoints_left`."""
        self._move_out(steps, "left")

    def delete(self, steps: list[int]) -> None:
        """Deletes checkpoints that were kept for a while."""
        for step in steps:
            self._manager.delete(step)

    def wait(self) -> None:
        """Waits until all saves are on disk."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits until all saves are on disk, and releases the folder."""
        try:
            self.wait()
        finally:
            self._manager.close()
            if "_once" in vars(self):
                self._once.close()

    def _set_aside(self, steps: list[int]) -> None:
        self._move_out(steps, "damaged")

    def _move_out(self, steps: list[int], why: str) -> None:
        """To `checkpoints_WHY` beside the folder, or beside what it links to."""
        if steps:
            folder = self.folder.resolve()
            aside = folder.with_name(f"{folder.name}_{why}")
            processes.in_first(partial(self._move, steps, aside))
            self._manager.reload()

    def _move(self, steps: list[int], aside: Path) -> None:
        aside.mkdir(exist_ok=True)
        for step in steps:
            taken = len(list(aside.glob(f"{step}*")))
            name = f"{step}-{taken}" if taken else str(step)
            (self.folder / str(step)).rename(aside / name)
            _LOG.warning("checkpoint %d was moved to %s", step, aside / name)


def hindrance(error: BaseException | None) -> str | None:
    """The cause outside of a file for which it can't be read; None if the file itself is damaged.

    An input/output error counts as damage: a sector that is lost stays lost.

    Example:
        >>> hindrance(PermissionError(13, "Permission denied")), hindrance(ValueError("torn"))
        ('Permission denied', None)
    """
    if error is None:
        return None
    out_of_memory = isinstance(error, jax.errors.JaxRuntimeError) and "EXHAUSTED" in str(error)
    if isinstance(error, MemoryError) or out_of_memory:
        return "out of memory"
    return storage.cause(error, storage.READING)


def _raise_if_hindered(step: int, error: Exception) -> None:
    if cause := hindrance(error):
        raise _hindered(step, cause) from error


def _hindered(step: int, cause: str) -> Hindered:
    return Hindered(
        f"checkpoint {step} can't be read now: {cause}; nothing was set aside: mend that, and the "
        "same command goes on"
    )


def config_kept(folder: Path) -> dict[str, Any] | None:
    """The config in the newest checkpoint whose meta is undamaged."""
    steps = sorted(int(each.name) for each in folder.glob("*") if each.name.isdecimal())
    for step in reversed(steps):
        try:
            meta = json.loads((folder / str(step) / "meta" / "metadata").read_text("utf-8"))
            if meta.pop("meta_sha256") == _sha256(meta) and isinstance(meta["config"], dict):
                return meta["config"]
        # Whatever else it holds.
        except (OSError, ValueError, LookupError, AttributeError, TypeError, RecursionError):
            continue
    return None


def digest(tree: Any) -> dict[str, int]:
    """One 32-bit number per array, by its path.

    `Σ_i bits(x_i)·(2i + 1)·c mod 2³²`: the factors are odd, so that flipping any one bit changes
    the sum, and integer sums do not depend on their order, hence not on the mesh.

    Example:
        >>> one, other = digest({"a": jnp.array([1.0, 2.0])}), digest({"a": jnp.array([2.0, 1.0])})
        >>> list(one), one == other
        (['a'], False)
    """
    return {name: int(value) for name, value in _by_name(processes.to_host(_digest(tree)))}


def not_finite(tree: Any) -> list[str]:
    """The paths of arrays that contain infinity or NaN; computed on the devices.

    Example:
        >>> not_finite({"a": jnp.array([1.0, jnp.inf]), "b": jnp.array([1, 2])})
        ['a']
    """
    return [name for name, finite in _by_name(processes.to_host(_finite(tree))) if not finite]


def _by_name(tree: Any) -> list[tuple[str, Any]]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    name = jax.tree_util.keystr
    return [(name(path, simple=True, separator="/"), value) for path, value in leaves]


@jax.jit
def _finite(tree: Any) -> Any:
    return jax.tree.map(lambda x: jnp.all(jnp.isfinite(x)), tree)


@jax.jit
def _digest(tree: Any) -> Any:
    return jax.tree.map(_digest_array, tree)


def _digest_array(x: Array) -> Array:
    unsigned = jnp.dtype(f"uint{8 * x.dtype.itemsize}")
    bits = jax.lax.bitcast_convert_type(x, unsigned).astype(jnp.uint32)
    index = jnp.zeros((), jnp.uint32)
    # The position in row-major order, without a reshape that would gather a sharded array.
    for axis, size in enumerate(x.shape):
        index = index * size + jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis)
    return jnp.sum(bits * (2 * index + 1) * jnp.uint32(2654435761), dtype=jnp.uint32)


def _sha256(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _parts(state: Any) -> dict[str, Any]:
    """The parts that have arrays to read or write; empty ones may differ between versions."""
    known = state._asdict()
    return {
        name: x
        for name, x in known.items()
        if jax.tree.leaves(x) and x is not _UNREAD and name != _FROZEN
    }


def _name_once(digests: Mapping[str, int]) -> int:
    """The name under which frozen parameters are stored; 0 if nothing is frozen."""
    frozen = {name: x for name, x in digests.items() if name.startswith(f"{_FROZEN}/")}
    return 1 + int(_sha256(frozen)[:7], 16) if frozen else 0


def _wanted(parts: dict[str, Any]) -> Any:
    """The request to Orbax: all arrays except those that are `...`."""
    how = ocp.checkpoint_utils.construct_restore_args(parts)
    return ocp.args.PyTreeRestore(parts, restore_args=how, partial_restore=True)


def _handler() -> ocp.PyTreeCheckpointHandler:
    """A handler with which one device writes all of a small array that lies on many devices.

    By default each device writes a part of any array, and Orbax compiles a program for each part.
    """
    arrays = ocp.type_handlers.ArrayHandler(min_slice_bytes_for_replica_parallel=2**20)
    placeholders = ocp.type_handlers.get_type_handler(type(_UNREAD))
    known = ((jax.Array, arrays), (type(_UNREAD), placeholders))
    registry = ocp.type_handlers.create_type_handler_registry(*known)
    return ocp.PyTreeCheckpointHandler(type_handler_registry=registry)


def _first_line(error: Exception) -> str:
    text = str(error).strip() or type(error).__name__
    return json.dumps(text.splitlines()[0][:200])
