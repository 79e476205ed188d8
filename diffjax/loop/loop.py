"""Training, from a config to a page, read from top to bottom."""

import logging
import math
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from diffjax.data import DataSet
from diffjax.errors import UserError
from diffjax.host.interrupts import Interrupted, stop_signals
from diffjax.host.lock import locked
from diffjax.host.prefetch import prefetched
from diffjax.host.processes import in_first, is_first, translate_lost_processes
from diffjax.host.run_files import read_json
from diffjax.host.storage import make_writable, translate_storage_errors
from diffjax.host.watchdog import Watchdog, watched
from diffjax.loop.begin import Begin, initial_weights, restore_or_init
from diffjax.loop.compiled_step import compile_train_step, train_flops
from diffjax.loop.device_batches import device_batches
from diffjax.loop.evaluations import Evaluations, check_evaluators
from diffjax.loop.logging import join
from diffjax.loop.pending_metrics import NonFiniteLoss
from diffjax.loop.profile import Profile, profiled
from diffjax.loop.recorder import Recorder, open_writers
from diffjax.loop.rollback import Rollbacks, roll_back
from diffjax.loop.training import Training, checkpoints_of
from diffjax.runs import workdirs
from diffjax.runs.extension import planned, restart_step, scheduled
from diffjax.runs.load import Run
from diffjax.runs.measure import check_evaluation, measure
from diffjax.runs.setup import Setup, check_pairs, set_up
from diffjax.runs.teacher import find_teacher, read_teacher
from diffjax.settings import check_complete, check_settings
from diffjax.spec import build, check_arguments
from diffjax.training.state import TrainState

_LOG = logging.getLogger("diffjax")


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
        with closing(checkpoints_of(setup, workdir)) as checkpoints:
            training = Training(
                setup, dataset, workdir, checkpoints, should_stop, watchdog, profile, command
            )
            in_first(lambda: workdirs.check_kept(workdir, checkpoints.steps(), config))
            train_and_evaluate(training, Begin(initial, extension))
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
    setup = set_up(config, dataset.image_shape, dataset.condition, codec=dataset.codec)
    check_pairs(setup, dataset)
    check_evaluation(setup, dataset)
    check_evaluators(setup, dataset)
    find_teacher(setup)
    return setup, dataset


def train_and_evaluate(training: Training, begin: Begin = Begin()) -> TrainState:
    """The loop: all steps that a run lacks, then the evaluation of the last one.

    It never waits for the devices, but where recorder and evaluators do.

    Returns:
        The state after the last step.

    Raises:
        UserError: the data changed since the run began; a batch can't be read, and what there is
            was saved.
        NonFiniteLoss: the run may not be rolled back, or not any more.
        Interrupted: `training.should_stop` returned True; the state was saved.
    """
    setup, dataset, workdir = training.setup, training.dataset, training.workdir
    checkpoints, watchdog, config = training.checkpoints, training.watchdog, setup.config

    # The state that a run begins with or goes on from (`restore_or_init`); the first that holds:
    # 1. resumed: there is a whole checkpoint. Nothing else is read, also not `config.init_from`.
    # 2. initialised: `config.init_from` names weights. Live parameters and all averages are
    #    these; the optimizer's state is fresh and the step is 0.
    # 3. fresh: parameters are drawn by the seed.
    # A resumed run may be
    # - extended: with more steps or another learning rate, which `Extension` has checked and
    #   notes in run.json. The state stays as it is, but that the schedule's count may restart;
    # - rolled back, below: resumed from an earlier checkpoint, and on from there with batches and
    #   noise in another order.
    with watched(watchdog, workdir, what="checkpoint"):
        restart = math.inf if begin.restarts else restart_step(workdir)
        state, start = restore_or_init(setup, checkpoints, dataset, begin.initial, restart)
    if begin.extension is not None:
        begin.extension.record(workdir, setup, state, start["schedule_start"])
    if "init_from" in start:
        workdirs.record(workdir, init_from=start["init_from"])
    workdirs.record_run(workdir, setup, dataset, training.command)
    if start["step"] >= config.num_steps:
        _LOG.info("%s is finished: %d of %d steps", workdir, start["step"], config.num_steps)

    _, step_key = jax.random.split(jax.random.key(config.seed))
    with watched(watchdog, workdir) as begun:
        while start["step"] < config.num_steps:
            rollbacks = Rollbacks.read(workdir)
            try:
                with ExitStack() as stack:
                    made = device_batches(setup, dataset, start["step"], rollbacks)
                    batches = stack.enter_context(prefetched(made))
                    schedule = config.optimizer, config.num_steps, start["schedule_start"]
                    with workdirs.timed(workdir, "compile_seconds"):
                        optimizer, teacher = scheduled(*schedule), read_teacher(setup, workdir)
                        train_step = compile_train_step(setup, step_key, optimizer, teacher)
                    if start["step"] == 0:
                        workdirs.record(workdir, train_flops_per_step=train_flops(setup))
                    recorder = Recorder(training, start)
                    stack.enter_context(workdirs.timed(workdir, "train_seconds"))
                    stack.enter_context(closing(recorder))
                    evaluations = Evaluations(training, start["step"])
                    stack.enter_context(closing(evaluations))
                    # A folder that can't hold a checkpoint shows now, not after an hour.
                    recorder.save(state)
                    train_step = stack.enter_context(
                        profiled(training.profile, workdir, train_step, start["step"])
                    )

                    for step in range(start["step"] + 1, config.num_steps + 1):
                        begun(step)
                        # Those of the step before, so that none are lost where a run stops there.
                        if evaluations.due(step - 1):
                            with recorder.aside(state):
                                evaluations.make(state, recorder.writer, begun)
                        try:
                            batch = next(batches)
                        except UserError:
                            # Of several processes the others know nothing of it, and saving takes
                            # all of them.
                            if jax.process_count() == 1:
                                recorder.save(state)
                            raise
                        state, metrics = train_step(state, rollbacks.key(step_key, step), batch)
                        stop = training.should_stop() and step < config.num_steps
                        recorder.add(step, metrics)
                        if recorder.due(step, stop):
                            recorder.keep(step, state, stop)
                        if stop:
                            raise Interrupted(
                                f"stopped at step {step} of {config.num_steps} and saved in "
                                f"{workdir}; the same command goes on from there"
                            )
                break
            except NonFiniteLoss as error:
                trouble = error.with_traceback(None)
            state = metrics = None  # The broken state makes room for a good one.
            roll_back(workdir, checkpoints, trouble, setup.nonfinite.rollbacks)
            restart = restart_step(workdir)
            state, start = restore_or_init(setup, checkpoints, dataset, restart=restart)

    with watched(watchdog, workdir, what="checkpoint"):
        checkpoints.wait()  # An evaluation is of something that is on disk.
    with watched(watchdog, workdir, what="batch of the evaluation") as begun:
        evaluate_once(training, state, begun)
    return state


def evaluate_once(training: Training, state: TrainState, begun: Any = lambda batch: None) -> None:
    """The evaluators' metrics and the evaluation of the last step, unless they are there."""
    workdir, last = training.workdir, training.setup.config.num_steps
    with closing(Evaluations(training, last)) as evaluations:
        if evaluations.due(last):
            with closing(join(open_writers(workdir, last, last))) as writer:
                evaluations.make(state, writer, begun)
    # One made beside the training, by experiments.evaluate, is of an earlier step.
    if (read_json(workdir / workdirs.EVALUATION) or {}).get("step") != last:
        run = Run(training.setup, state, workdir)
        measure(run, training.dataset, should_stop=training.should_stop, begun=begun)


def page(workdir: Path) -> Path:
    """Writes the run's page, and says where it is."""
    # Here, because it loads Matplotlib, which takes seconds that a first step need not wait for.
    from diffjax.reports.run_page import write_report

    return write_report(workdir)
