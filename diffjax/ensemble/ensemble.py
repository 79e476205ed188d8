"""Trains several configs as one program, if they differ only in real numbers and seeds."""

import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from diffjax.ensemble.grouping import incompatibility
from diffjax.ensemble.members import (
    compile_steps,
    member_batches,
    members_of,
    metrics_of,
    stack,
    unstacker,
)
from diffjax.errors import UserError
from diffjax.host.interrupts import Interrupted, stop_at_once, stop_signals, stopped_at
from diffjax.host.lock import locked
from diffjax.host.prefetch import prefetched
from diffjax.host.progress import progress
from diffjax.host.storage import make_writable, translate_storage_errors
from diffjax.host.watchdog import Watchdog, watched
from diffjax.loop.begin import initial_weights, restore_or_init
from diffjax.loop.compiled_step import train_flops
from diffjax.loop.evaluations import Evaluations
from diffjax.loop.loop import evaluate_once, page, prepared
from diffjax.loop.pending_metrics import NonFiniteLoss
from diffjax.loop.recorder import Recorder
from diffjax.loop.trackers.base import tracking
from diffjax.loop.training import Training, checkpoints_of
from diffjax.runs.checkpoints import Checkpoints
from diffjax.runs.extension import restart_step
from diffjax.runs.setup import Setup
from diffjax.runs.workdirs import (
    REPORT,
    add_seconds,
    check_kept,
    claim,
    record,
    record_run,
)

_LOG = logging.getLogger("diffjax")


class MembersFailed(UserError):
    """Some members of an ensemble failed; the others are finished.

    Attributes:
        failures: error message of each failed member, by its folder.
    """

    def __init__(self, failures: Mapping[Path, str]):
        self.failures = dict(failures)
        super().__init__("; ".join(f"{workdir}: {why}" for workdir, why in failures.items()))


@dataclass
class Member:
    """One run of an ensemble and its progress.

    Attributes:
        training: what it trains on and with.
        state: its training state; None while the state is part of the stacked states.
        start: metadata of the checkpoint that `state` was restored from.
        failure: why it stopped training; "" if it did not fail.
    """

    training: Training
    state: Any = None
    start: Mapping[str, Any] = field(default_factory=dict)
    failure: str = ""

    @property
    def setup(self) -> Setup:
        """The parts that its config describes."""
        return self.training.setup

    @property
    def workdir(self) -> Path:
        """Its folder."""
        return self.training.workdir

    @property
    def checkpoints(self) -> Checkpoints:
        """Its checkpoints."""
        return self.training.checkpoints

    @property
    def step(self) -> int:
        """The step from which it trains on."""
        return self.start["step"]


def train_together(
    configs: Sequence[ConfigDict],
    workdirs: Sequence[str | Path],
    commands: Sequence[str] = (),
    watchdog: Watchdog = Watchdog(),
) -> list[Path]:
    """Trains several configs as one program; each member gets the same folder as by `train`.

    The same call resumes an interrupted ensemble. `train` can resume any of its folders, and an
    ensemble can resume folders of `train`. If the newest checkpoints of unfinished members are at
    different steps, all resume from the newest step that every member has. If there is no such
    step, members at different steps train separately.

    Args:
        configs: resolved configs; `incompatibility` explains in what they may differ.
        workdirs: one folder for each member.
        commands: for each member, the command that repeats it, for its report.
        watchdog: time limits of a hang, as in `train`; stacks are written to the first folder.

    Returns:
        The path of each member's `report.html`.

    Raises:
        UserError: as in `train`, or the configs can't train together; nothing is written then.
        MembersFailed: some members failed; raised after all others have finished.
        StorageError: a folder can't be written any more; saved checkpoints are intact.
        Interrupted: Ctrl-C or SIGTERM, after all members were saved.
    """
    folders = [Path(folder) for folder in workdirs]
    commands = commands or [""] * len(configs)
    _check(configs, folders, commands)
    first, dataset = prepared(configs[0])
    setups = [first, *(prepared(config, dataset)[0] for config in configs[1:])]
    for setup, folder in zip(setups, folders, strict=True):
        initial_weights(setup.parts, folder)

    with ExitStack() as stack:
        for folder in folders:
            make_writable(folder)
            stack.enter_context(locked(folder))
        stack.enter_context(translate_storage_errors(Path(os.path.commonpath(folders))))
        should_stop = stack.enter_context(stop_signals())
        members = []
        for setup, folder, command in zip(setups, folders, commands, strict=True):
            claim(folder, setup.config)
            checkpoints = stack.enter_context(closing(checkpoints_of(setup, folder)))
            trackers = stack.enter_context(tracking(setup.config, folder))
            how = {"command": command, "trackers": trackers}
            training = Training(setup, dataset, folder, checkpoints, should_stop, **how)
            members.append(Member(training))
        with watched(watchdog, folders[0], what="checkpoint"):
            _resume(members)
        names = [folder.name for folder in folders]
        for index, member in enumerate(members):
            ensemble = {"members": len(members), "index": index, "names": names}
            record_run(
                member.workdir, member.setup.parts, dataset, member.training.command, ensemble
            )
        _LOG.info("training %d members as one program", len(members))
        for group in _groups_by_step(members):
            with watched(watchdog, folders[0]) as begun:
                _train(group, begun)
        with watched(watchdog, folders[0], what="batch of the evaluations") as begun:
            pages = [_finish(member, begun) for member in members]
    failures = {member.workdir: member.failure for member in members if member.failure}
    if failures:
        raise MembersFailed(failures)
    return pages


def _check(configs: Sequence[ConfigDict], folders: Sequence[Path], commands: Sequence[str]) -> None:
    if not len(configs) == len(folders) == len(commands) or not configs:
        raise UserError(
            f"an ensemble needs one config, one folder and one command per member, not "
            f"{len(configs)}, {len(folders)} and {len(commands)}"
        )
    if len({folder.resolve() for folder in folders}) < len(folders):
        raise UserError("two members of an ensemble have the same folder: use a folder for each")
    if jax.process_count() > 1:
        raise UserError("an ensemble trains in one process: use experiments.train on several hosts")
    reason = incompatibility(configs)
    if reason:
        raise UserError(
            f"these configs can't train as one program ({reason}): train them separately"
        )


def _resume(members: Sequence[Member]) -> None:
    """Restores the newest state of each member; unfinished members get a common step."""
    for member in members:
        check_kept(member.workdir, member.checkpoints.steps(), member.setup.config)
        given = (member.setup, member.checkpoints, member.training.dataset)
        member.state, member.start = restore_or_init(*given)
        if restart_step(member.workdir) >= 0:
            raise UserError(
                f"the schedule of {member.workdir} started anew on the way: train it by itself"
            )
        if "init_from" in member.start:
            record(member.workdir, init_from=member.start["init_from"])
    going = [member for member in members if not _finished(member)]
    newest = {member.workdir.name: member.step for member in going}
    while len({member.step for member in going}) > 1:
        common = set.intersection(*map(_steps_up_to_now, going))
        if not common:
            _LOG.warning(
                "members have no common checkpoint step (%s): members at different steps train "
                "separately",
                newest,
            )
            return
        for member in going:
            _go_back(member, max(common))
    if going and {going[0].step} != set(newest.values()):
        _LOG.warning(
            "resuming from step %d, the newest that all members have (%s)", going[0].step, newest
        )
        for member in going:
            member.checkpoints.leave([s for s in member.checkpoints.steps() if s > member.step])


def _steps_up_to_now(member: Member) -> set[int]:
    kept = {step for step in member.checkpoints.steps() if step <= member.step}
    return kept or {member.step}


def _go_back(member: Member, step: int) -> None:
    """Restores a member's checkpoint of this step, or the newest intact one before it."""
    if member.step > step:
        restored = member.checkpoints.restore(member.setup.abstract, newest=step)
        assert restored is not None, "this step was listed among the checkpoints"
        member.state, member.start = restored


def _finished(member: Member) -> bool:
    return member.step >= member.setup.config.num_steps


def _groups_by_step(members: Sequence[Member]) -> list[list[Member]]:
    """Unfinished members grouped by the step they resume from; usually one group."""
    steps = dict.fromkeys(member.step for member in members if not _finished(member))
    return [[member for member in members if member.step == step] for step in steps]


def _train(group: Sequence[Member], begun: Callable[[int], None]) -> None:
    """The loop of `diffjax.loop.loop` for members that resume from the same step."""
    training, start_step = group[0].training, group[0].step
    num_steps = training.setup.config.num_steps
    members = members_of([member.setup for member in group])
    began = time.perf_counter()
    states = stack(members, [member.state for member in group])
    stopped = (
        f"stopped while compiling, at step {start_step} of {num_steps}; the same command goes on "
        "from there"
    )
    what = f"compiling the training step of {len(group)} members"
    with stop_at_once(stopped), progress(what):
        take_step, state_of = compile_steps(members, states), unstacker(members)
    _share_seconds(group, compile_seconds=time.perf_counter() - began)
    if start_step == 0:
        flops = train_flops(members.setups[0])  # members differ in numbers, not in FLOPs
        for member in group:
            record(member.workdir, train_flops_per_step=flops)
    recorders = [
        Recorder(member.training, member.start, bar=i == 0) for i, member in enumerate(group)
    ]
    evaluations = [Evaluations(member.training, start_step) for member in group]

    def going() -> list[tuple[int, Member, Recorder]]:
        each = enumerate(zip(group, recorders, strict=True))
        return [(i, member, recorder) for i, (member, recorder) in each if not member.failure]

    def folders() -> str:
        return ", ".join(str(member.workdir) for _, member, _ in going())

    def save_all(states: Any) -> None:
        for i, member, recorder in going():
            with _failing(member):
                recorder.save(state_of(states, i))

    began = time.perf_counter()
    try:
        for member, recorder in zip(group, recorders, strict=True):
            recorder.save(member.state)
        if training.should_stop():
            raise Interrupted(stopped_at(start_step, num_steps, folders()))
        for member, recorder in zip(group, recorders, strict=True):
            recorder.draw_beginning(member.state)
            member.state = None  # It is part of the stacked states; frees the memory.
        with prefetched(member_batches(members, training.dataset, start_step)) as stream:
            for step in range(start_step + 1, num_steps + 1):
                begun(step)
                try:
                    for i, member, recorder in going():
                        if evaluations[i].due(step - 1):
                            state = state_of(states, i)
                            with _failing(member), recorder.aside(state):
                                evaluations[i].make(state, recorder.writer, begun)
                except Interrupted:
                    save_all(states)
                    raise
                states, metrics = take_step(states, next(stream))
                stop = training.should_stop() and step < num_steps
                try:
                    for i, member, recorder in going():
                        with _failing(member):
                            recorder.add(step, metrics_of(metrics, i))
                            if recorder.due(step, stop):
                                recorder.keep(step, state_of(states, i), stop)
                except Interrupted:
                    save_all(states)
                    raise
                if not going():
                    return
                if stop:
                    raise Interrupted(stopped_at(step, num_steps, folders()))
    finally:
        for each in (*recorders, *evaluations):
            each.close()
        _share_seconds(group, train_seconds=time.perf_counter() - began)
    for i, member in enumerate(group):
        member.state = state_of(states, i)


@contextmanager
def _failing(member: Member) -> Iterator[None]:
    """Marks a member as failed if its loss is not finite; the others go on."""
    try:
        yield
    except NonFiniteLoss as error:
        member.failure = str(error)
        _LOG.warning("%s stopped training: %s", member.workdir, error)


def _share_seconds(group: Sequence[Member], **seconds: float) -> None:
    """Adds an equal share of seconds to the record of each member."""
    for member in group:
        add_seconds(member.workdir, **{name: s / len(group) for name, s in seconds.items()})


def _finish(member: Member, begun: Callable[[int], None]) -> Path:
    """Evaluates a trained member and writes its report; returns the path of the report."""
    if not member.failure:
        member.checkpoints.wait()  # The evaluated state must be on disk.
        try:
            evaluate_once(member.training, member.state, begun)
            return page(member.workdir)
        except UserError as error:
            member.failure = str(error)
    return member.workdir / REPORT
