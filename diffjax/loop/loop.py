"""Training, from a config to a page, read from top to bottom."""

import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax import Array
from ml_collections import ConfigDict

from diffjax.compiling import jit
from diffjax.data import Augment, DataSet, batches
from diffjax.errors import UserError
from diffjax.host.interrupts import Interrupted, stop_signals
from diffjax.host.lock import locked
from diffjax.host.prefetch import prefetched
from diffjax.host.processes import in_first, is_first, translate_lost_processes
from diffjax.host.run_files import read_json
from diffjax.host.storage import make_writable, translate_storage_errors
from diffjax.host.watchdog import Watchdog, watched
from diffjax.loop.pending_metrics import NonFiniteLoss
from diffjax.loop.profile import Profile, profiled
from diffjax.loop.recorder import Recorder
from diffjax.loop.rollback import Rollbacks, roll_back, seed_of
from diffjax.optimizers.base import Optimizer
from diffjax.runs import workdirs
from diffjax.runs.checkpoints import Checkpoints
from diffjax.runs.extension import (
    Extension,
    planned,
    restart_step,
    restarts_at,
    scheduled,
)
from diffjax.runs.initial import Initial, find
from diffjax.runs.load import Run
from diffjax.runs.measure import check_evaluation, measure
from diffjax.runs.setup import Setup, check_pairs, countable, set_up
from diffjax.runs.teacher import find_teacher, read_teacher
from diffjax.settings import check_complete, check_settings
from diffjax.spec import build, check_arguments
from diffjax.training.averages import Averages
from diffjax.training.flops import flops_if_countable
from diffjax.training.sharding import batch_sharding, part_of_batch, replicated
from diffjax.training.state import LIVE, TrainState
from diffjax.training.step import TrainStep, make_train_step

_LOG = logging.getLogger("diffjax")


class Begin(NamedTuple):
    """What a run begins with beside what lies in its folder; see `restore_or_init`.

    Attributes:
        initial: the weights of `config.init_from`, of a run that has not begun.
        extension: what changes in a run that has.
    """

    initial: Initial | None = None
    extension: Extension | None = None


def page(workdir: Path) -> Path:
    """Writes the run's page, and says where it is."""
    # Here, because it loads Matplotlib, which takes seconds that a first step need not wait for.
    from diffjax.reports.run_page import write_report

    return write_report(workdir)


def train(
    config: ConfigDict,
    workdir: str | Path,
    command: str = "",
    *,
    extend: bool | str = False,
    watchdog: Watchdog = Watchdog(),
    profile: Profile = Profile(),
) -> Path:
    """Trains what a config describes, evaluates it, and writes the run's page.

    Running it again with the same config goes on where it stopped; a finished run is left as it
    is, but for an evaluation or page that is missing.

    Args:
        config: resolved, as a config file's `get_config` gives it.
        workdir: the run's folder.
        command: how to make the run again, for its page.
        extend: go on with a run of another config, as one of more steps, if what differs changes no
            shape, no data and no loss; "continue" or "restart" where the learning rate depends on
            the number of steps (`diffjax.runs.extension.planned`).
        watchdog: when steps that don't come are a hang, which ends the process with status 75.
        profile: which steps leave a trace in the folder's `profile`.

    Returns:
        The path of `report.html`.

    Raises:
        UserError: a config that can't work, a folder that holds another run or is being trained
            by another process, changed data.
        StorageError: the folder can't be written any more; what was saved before is whole.
        NonFiniteLoss: with the step, the log-SNR bins and the last good checkpoint.
        Interrupted: Ctrl-C or SIGTERM, after saving.
    """
    check_arguments(
        train, config=config, workdir=workdir, command=command, watchdog=watchdog, profile=profile
    )
    workdir = Path(workdir)

    # What there is to train, and whether it can be trained at all; nothing is written yet.
    setup, dataset = prepared(config)
    profile.check(config.num_steps)
    initial = initial_weights(setup, workdir)

    in_first(lambda: make_writable(workdir))
    with (
        translate_lost_processes(),
        locked(workdir),
        translate_storage_errors(workdir),
        stop_signals() as should_stop,
    ):
        extension = planned(workdir, setup, extend)
        workdirs.claim(workdir, config, extended=extension is not None)
        _LOG.info("training %s in %s", config.name, workdir)
        _LOG.info("attention: %s", setup.attention or "the network's own")
        for note in dataset.notes:
            _LOG.warning("%s", note)
        begin = Begin(initial, extension)
        run_all(setup, dataset, workdir, command, should_stop, watchdog, profile, begin)
        return page(workdir) if is_first() else workdir / workdirs.REPORT


def prepared(config: ConfigDict) -> tuple[Setup, DataSet]:
    """A config's parts and data, with all checked that training and evaluating it needs.

    Nothing is compiled but small programs, and nothing is written.

    Args:
        config: resolved.

    Raises:
        UserError: the first thing that does not fit.
    """
    check_complete(config)
    check_settings(config)
    dataset: DataSet = build(config.data, DataSet, "config.data")
    setup = set_up(config, dataset.image_shape, dataset.condition)
    check_pairs(setup, dataset)
    check_evaluation(setup, dataset)
    find_teacher(setup)
    return setup, dataset


def run_all(
    setup: Setup,
    dataset: DataSet,
    workdir: Path,
    command: str,
    should_stop: Callable[[], bool],
    watchdog: Watchdog = Watchdog(),
    profile: Profile = Profile(),
    begin: Begin | None = None,
) -> None:
    """Everything that is missing: steps, then the evaluation of the last one."""
    config = setup.config
    checkpoints = Checkpoints(
        workdir / "checkpoints", config.checkpoints_to_keep, config.checkpoints_kept_every_steps
    )
    with closing(checkpoints):
        in_first(lambda: workdirs.check_kept(workdir, checkpoints.steps(), config))
        with watched(watchdog, workdir, what="checkpoint"):
            begin = begin or Begin()
            restarts = begin.extension is not None and begin.extension.restart
            restart = math.inf if restarts else restart_step(workdir)
            state, start = restore_or_init(setup, checkpoints, dataset, begin.initial, restart)
        if begin.extension is not None:
            begin.extension.record(workdir, setup, state, start["schedule_start"])
        if "init_from" in start:
            workdirs.record(workdir, init_from=start["init_from"])
        workdirs.record_run(workdir, setup, dataset, command)
        if start["step"] < config.num_steps:
            with watched(watchdog, workdir) as begun:
                state = run_and_roll_back(
                    setup, dataset, (state, start), checkpoints, workdir, should_stop, begun,
                    profile,
                )  # fmt: skip
        else:
            _LOG.info("%s is finished: %d of %d steps", workdir, start["step"], config.num_steps)
        with watched(watchdog, workdir, what="checkpoint"):
            checkpoints.wait()  # An evaluation is of something that is on disk.
        with watched(watchdog, workdir, what="batch of the evaluation") as begun:
            evaluate_once(setup, dataset, state, workdir, should_stop, begun)


def evaluate_once(
    setup: Setup,
    dataset: DataSet,
    state: TrainState,
    workdir: Path,
    should_stop: Callable[[], bool],
    begun: Callable[[int], Any] = lambda batch: None,
) -> None:
    """The evaluation of the last step, unless there is one."""
    # One made beside the training, by experiments.evaluate, is of an earlier step.
    evaluated = (read_json(workdir / workdirs.EVALUATION) or {}).get("step")
    if evaluated != setup.config.num_steps:
        run = Run(setup, state, workdir)
        measure(run, dataset, should_stop=should_stop, begun=begun)


def run_and_roll_back(
    setup: Setup,
    dataset: DataSet,
    begin: tuple[TrainState, Mapping[str, Any]],
    checkpoints: Checkpoints,
    workdir: Path,
    should_stop: Callable[[], bool],
    begun: Callable[[int], None],
    profile: Profile = Profile(),
) -> TrainState:
    """Runs all steps; a loss that is not finite leads back to a checkpoint as often as it may."""
    rollbacks = Rollbacks.read(workdir)
    while True:
        try:
            return run_steps(
                setup, dataset, *begin, checkpoints, workdir, should_stop, begun, rollbacks,
                profile,
            )  # fmt: skip
        except NonFiniteLoss as error:
            trouble = error.with_traceback(None)  # whose frames hold the broken state
        rollbacks = roll_back(workdir, checkpoints, trouble, setup.nonfinite.rollbacks)
        restart = restart_step(workdir)
        begin = restore_or_init(setup, checkpoints, dataset, restart=restart)


def initial_weights(setup: Setup, workdir: Path) -> Initial | None:
    """The weights of `config.init_from`; None if there are none, or the run has begun already.

    Raises:
        UserError: there are no such weights, or they are of another network.
    """
    named = setup.config.get("init_from", "")
    begun = workdirs.checkpoint_steps(workdir)
    return find(named, setup.abstract.weights(LIVE)) if named and not begun else None


def restore_or_init(
    setup: Setup,
    checkpoints: Checkpoints,
    dataset: DataSet,
    initial: Initial | None = None,
    restart: float = -math.inf,
) -> tuple[TrainState, Mapping[str, Any]]:
    """The state that a run goes on from, and what is known of it: its step, or a checkpoint's meta.

    Args:
        setup: of the run.
        checkpoints: of the run.
        dataset: what it trains on.
        initial: from `initial_weights`, checked before anything was written.
        restart: the step up to which a checkpoint's schedule is to start anew.

    Raises:
        UserError: the data are not those that the run began with; as `initial_weights`.
    """
    # What a state begins as; the first of these that holds:
    # 1. resumed: there is a whole checkpoint. Nothing else is read, also not `config.init_from`.
    #    It may be extended: with more steps or another learning rate, which `Extension` has checked
    #    and notes in run.json. The state stays as it is, but that the schedule's count may restart.
    # 2. initialised: `config.init_from` names weights. Live parameters and all averages are
    #    these; the optimizer's state is fresh and the step is 0.
    # 3. fresh: parameters are drawn by the seed.
    restored = checkpoints.restore(setup.abstract)
    if restored is None:
        if named := setup.config.get("init_from", ""):
            params, source = (initial or find(named, setup.abstract.weights(LIVE)))()
            _LOG.info("beginning with the weights of %s", named)
            return setup.begin(params), {"step": 0, "schedule_start": 0, "init_from": source}
        init_key, _ = jax.random.split(jax.random.key(setup.config.seed))
        return setup.init(init_key), {"step": 0, "schedule_start": 0}
    state, meta = restored
    if meta["data_sha256"] != dataset.train.fingerprint():
        raise UserError(
            f"the training images of {dataset.name} changed since this run began: bring the old "
            "ones back, or start again in another --workdir"
        )
    _LOG.info("resuming at step %d of %d", meta["step"], setup.config.num_steps)
    state, schedule_start = restarts_at(restart, setup, state, meta)
    return state, {**meta, "schedule_start": schedule_start}


def run_steps(
    setup: Setup,
    dataset: DataSet,
    state: TrainState,
    start: Mapping[str, Any],
    checkpoints: Checkpoints,
    workdir: Path,
    should_stop: Callable[[], bool],
    begun: Callable[[int], None] = lambda step: None,
    rollbacks: Rollbacks = Rollbacks(),
    profile: Profile = Profile(),
) -> TrainState:
    """Makes the steps from the one where `start`, a checkpoint's meta, is to `num_steps`.

    `begun` is told of each step; `rollbacks` say with which data and noise it is made.
    """
    start_step, config = start["step"], setup.config
    _, step_key = jax.random.split(jax.random.key(config.seed))

    def key_of(step: int) -> Array:
        order = rollbacks.order(step)
        return jax.random.fold_in(step_key, order) if order else step_key

    with prefetched(device_batches(setup, dataset, start_step, rollbacks)) as stream:
        began = time.perf_counter()
        schedule = config.optimizer, config.num_steps, start["schedule_start"]
        teacher = read_teacher(setup, workdir)
        train_step = compile_train_step(setup, step_key, scheduled(*schedule), teacher)
        workdirs.add_seconds(workdir, compile_seconds=time.perf_counter() - began)
        if start_step == 0:
            workdirs.record(workdir, train_flops_per_step=train_flops(setup))
        recorder = Recorder(setup, dataset, start, checkpoints, workdir)

        began = time.perf_counter()
        try:
            # A folder that can't hold a checkpoint shows now, not after an hour.
            recorder.save(state)
            with profiled(profile, workdir, train_step, start_step) as train_step:
                steps = range(start_step + 1, config.num_steps + 1)
                state, step = take_steps(
                    train_step, state, steps, stream, recorder, key_of, should_stop, begun
                )
            if step < config.num_steps:
                raise Interrupted(
                    f"stopped at step {step} of {config.num_steps} and saved in {workdir}; "
                    "the same command goes on from there"
                )
        finally:
            recorder.close()
            workdirs.add_seconds(workdir, train_seconds=time.perf_counter() - began)
    return state


def take_steps(
    train_step: Callable,
    state: TrainState,
    steps: range,
    stream: Iterator[Any],
    recorder: Recorder,
    key_of: Callable[[int], Array],
    should_stop: Callable[[], bool] = lambda: False,
    begun: Callable[[int], None] = lambda step: None,
) -> tuple[TrainState, int]:
    """The loop itself. It never waits for the devices, but where the recorder does.

    Returns:
        The state and the last step that was made, which is one of `steps` if it should stop there.

    Raises:
        UserError: the next batch can't be had; what there is is saved first.
    """
    step = steps.start
    for step in steps:
        begun(step)
        try:
            batch = next(stream)
        except UserError:
            # Of several processes the others know nothing of it, and saving takes all of them.
            if jax.process_count() == 1:
                recorder.save(state)
            raise
        state, metrics = train_step(state, key_of(step), batch)
        stop = should_stop() and step < steps[-1]
        recorder.add(step, metrics)
        if recorder.due(step, stop):
            recorder.keep(step, state, stop)
        if stop:
            break
    return state, step


def train_step_of(setup: Setup, optimizer: Optimizer | None = None) -> TrainStep:
    """The pure train step of a run; its optimizer may be one whose schedule began later."""
    return make_train_step(
        setup.wired.apply,
        setup.wired.objective,
        optimizer or setup.optimizer,
        num_steps=setup.config.num_steps,
        averages=Averages.of(setup.config),
        label_dropout=setup.config.label_dropout,
        condition=setup.wired.condition,
        teacher=setup.teacher,
        nonfinite=setup.nonfinite,
        accumulation_steps=setup.accumulation_steps,
    )


def compile_train_step(
    setup: Setup, key: Array, optimizer: Optimizer | None = None, frozen_teacher: Any = None
) -> Callable:
    """The train step for this mesh, compiled before the clock starts; it donates its state."""
    config, wired = setup.config, setup.wired
    place = batch_sharding(setup.mesh)
    batch = jax.tree.map(
        lambda rows: jax.ShapeDtypeStruct(rows.shape, rows.dtype, sharding=place),
        wired.batch_shapes(config.batch_size),
    )
    jitted = jit(
        train_step_of(setup, optimizer),
        mesh=setup.mesh,
        donate_argnums=0,
        out_shardings=(setup.shardings, replicated(setup.mesh)),
    )
    if frozen_teacher is None:
        return jitted.lower(setup.abstract, key, batch).compile()
    compiled = jitted.lower(setup.abstract, key, batch, frozen_teacher).compile()
    return lambda state, key, batch: compiled(state, key, batch, frozen_teacher)


def train_flops(setup: Setup) -> float | None:
    """Counted operations of one training step, as `matrix_flops`; None if they can't be counted."""
    setup = countable(setup)
    key = jax.eval_shape(lambda: jax.random.key(0))
    batch = setup.wired.batch_shapes(setup.config.batch_size)
    return flops_if_countable(train_step_of(setup), setup.abstract, key, batch)


def device_batches(
    setup: Setup, dataset: DataSet, start_step: int, rollbacks: Rollbacks = Rollbacks()
) -> Iterator[dict[str, Array]]:
    """Global batches from `start_step` on; each process reads its own rows of them."""
    config = setup.config
    place = batch_sharding(setup.mesh)
    part = part_of_batch(place, config.batch_size)
    used = setup.wired.batch_shapes(config.batch_size)
    for order, first, last in rollbacks.stretches(start_step, config.num_steps):
        stream = batches(
            dataset.train,
            batch_size=config.batch_size,
            seed=seed_of(config.seed, order),
            start_step=first,
            augment=build(config.get("augment", Augment())),
            part=part,
        )
        for batch in islice(stream, last - first):
            yield {
                name: jax.make_array_from_process_local_data(place, batch[name], shape.shape)
                for name, shape in used.items()
            }
