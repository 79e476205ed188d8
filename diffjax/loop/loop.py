"""Training, from a config to a page, read from top to bottom."""

import logging
import math
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from diffjax.data import DataSet
from diffjax.errors import UserError
from diffjax.host.interrupts import Interrupted, stop_at_once, stop_signals, stopped_at
from diffjax.host.lock import locked
from diffjax.host.prefetch import prefetched
from diffjax.host.processes import in_first, is_first, translate_lost_processes
from diffjax.host.progress import progress
from diffjax.host.run_files import read_json
from diffjax.host.storage import check_named, make_writable, translate_storage_errors
from diffjax.host.watchdog import Watchdog, watched
from diffjax.loop.begin import Begin, initial_weights, restore_or_init
from diffjax.loop.callbacks import Callback, check_callbacks
from diffjax.loop.compiled_step import compile_train_step, train_flops
from diffjax.loop.device_batches import device_batches
from diffjax.loop.evaluations import Evaluations, check_evaluators
from diffjax.loop.logging import ProgressBar, join
from diffjax.loop.pending_metrics import NonFiniteLoss
from diffjax.loop.profile import Profile, profiled
from diffjax.loop.recorder import Recorder, open_writers
from diffjax.loop.rollback import Rollbacks, roll_back
from diffjax.loop.trackers.base import Onwards, trackers_of, tracking
from diffjax.loop.training import Training, checkpoints_of
from diffjax.runs import workdirs
from diffjax.runs.checks import check_buckets, check_config, check_expected, check_pairs
from diffjax.runs.extension import planned, restart_step, scheduled
from diffjax.runs.load import Run
from diffjax.runs.measuring.measure import check_evaluation, measure
from diffjax.runs.setup import Setup, set_up
from diffjax.runs.teacher import find_teacher, read_teacher
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
    callbacks: Sequence[Callback] = (),
) -> Path:
    """Trains the model of a config, evaluates it, and writes the run's page.

    Called again with the same config, it resumes where it stopped. Of a finished run it only adds
    an evaluation or page that is missing.

    Args:
        config: resolved, as a config file's `get_config` returns it.
        workdir: the run's folder.
        command: how to make the run again, for its page.
        extend: continue the run in this folder although its config differs, for example has more
            steps; what differs may change no shape, no data and no loss. "continue" or "restart"
            where the learning rate depends on the number of steps
            (`diffjax.runs.extension.planned`).
        watchdog: after how long without a step the run counts as hanging; the process then ends
            with status 75.
        profile: which steps leave a trace in the folder's `profile`.
        callbacks: functions `(step, run, numbers)`, called with each line of `metrics.jsonl`, for
            one's own logging, metrics and pictures (docs/training.md). `run` has the state of that
            step; numbers that one returns are a line too.

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
    check_callbacks(callbacks)
    check_named(workdir)
    workdir = Path(workdir)

    # All checks come before the first write.
    with progress("reading the data and checking that all parts fit"):
        setup, dataset = prepared(config)
    profile.check(config.num_steps)
    initial = initial_weights(setup.parts, workdir)

    in_first(lambda: make_writable(workdir))
    with (
        translate_lost_processes(),
        locked(workdir),
        translate_storage_errors(workdir),
        stop_signals() as should_stop,
    ):
        extension = planned(workdir, setup, extend)
        in_first(lambda: workdirs.claim(workdir, config, extended=extension is not None))
        _LOG.info("training %s in %s", config.name, workdir)
        _LOG.info("attention: %s", setup.parts.attention or "the network's own")
        for note in dataset.notes:
            _LOG.warning("%s", note)
        with (
            closing(checkpoints_of(setup, workdir)) as checkpoints,
            tracking(config, workdir) as trackers,
        ):
            how = (should_stop, watchdog, profile, command, trackers, callbacks)
            training = Training(setup, dataset, workdir, checkpoints, *how)
            in_first(lambda: workdirs.check_kept(workdir, checkpoints.steps(), config))
            train_and_evaluate(training, Begin(initial, extension))
        return page(workdir) if is_first() else workdir / workdirs.REPORT


def prepared(config: ConfigDict, dataset: DataSet | None = None) -> tuple[Setup, DataSet]:
    """A config's parts and data, after all checks that training and evaluation need.

    It compiles small programs alone and writes nothing.

    Args:
        config: resolved.
        dataset: that of the config, if it is built already.

    Raises:
        UserError: the first thing that does not fit.
    """
    check_config(config)
    data = dataset or build(config.data, DataSet, "config.data")
    check_expected(config, data)
    setup = set_up(config, data.image_shape, data.condition, codec=data.codec)
    check_pairs(setup.parts, data)
    check_buckets(setup.parts, data)
    check_evaluation(setup.parts, data)
    check_evaluators(setup.parts, data)
    trackers_of(config)
    find_teacher(setup.parts)
    return setup, data


def train_and_evaluate(training: Training, begin: Begin = Begin()) -> TrainState:
    """The loop: all steps that a run still needs, then the evaluation of the last one.

    It waits for the devices only where the recorder and the evaluators do.

    Returns:
        The state after the last step.

    Raises:
        UserError: the data changed since the run began; or a batch can't be read, after the state
            was saved.
        NonFiniteLoss: the run may not be rolled back, or was rolled back as often as allowed.
        Interrupted: `training.should_stop` returned True; the state was saved.
    """
    setup, dataset, workdir = training.setup, training.dataset, training.workdir
    checkpoints, watchdog, config = training.checkpoints, training.watchdog, setup.config

    # The state that a run starts from (`restore_or_init`) is the first of these that exists:
    # 1. resumed: a whole checkpoint. Nothing else is read, not even `config.init_from`.
    # 2. initialised: the weights that `config.init_from` names, for live parameters and all
    #    averages; the optimizer's state is fresh and the step is 0.
    # 3. fresh: parameters drawn from the seed.
    # A resumed run may be
    # - extended: with more steps or another learning rate, which `Extension` has checked and
    #   records in run.json. The state stays the same; only the schedule's count may restart;
    # - rolled back, below: resumed from an earlier checkpoint, with batches and noise in another
    #   order from there on.
    with watched(watchdog, workdir, what="checkpoint"):
        restart = math.inf if begin.restarts else restart_step(workdir)
        with progress("making or reading the state to begin with"):
            state, start = restore_or_init(setup, checkpoints, dataset, begin.initial, restart)
    if begin.extension is not None:
        begin.extension.record(workdir, setup, state, start["schedule_start"])
    if "init_from" in start:
        workdirs.record(workdir, init_from=start["init_from"])
    workdirs.record_run(workdir, setup.parts, dataset, training.command)
    if start["step"] >= config.num_steps:
        _LOG.info("%s is finished: %d of %d steps", workdir, start["step"], config.num_steps)

    _, step_key = jax.random.split(jax.random.key(config.seed))
    with watched(watchdog, workdir) as begun:
        while start["step"] < config.num_steps and not _ends_early(training, start["step"]):
            rollbacks = Rollbacks.read(workdir)
            try:
                with ExitStack() as stack:
                    made = device_batches(setup, dataset, start["step"], rollbacks)
                    batches = stack.enter_context(prefetched(made))
                    schedule = config.optimizer, config.num_steps, start["schedule_start"]
                    stopped = (
                        f"stopped while compiling, at step {start['step']} of {config.num_steps} "
                        f"in {workdir}; the same command goes on from there"
                    )
                    with (
                        workdirs.timed(workdir, "compile_seconds"),
                        stop_at_once(stopped),
                        progress("compiling the training step"),
                    ):
                        optimizer = scheduled(*schedule)
                        teacher = read_teacher(setup.parts, workdir)
                        train_step = compile_train_step(
                            setup, step_key, optimizer, teacher, dataset.train.buckets
                        )
                        if start["step"] == 0:
                            workdirs.record(workdir, train_flops_per_step=train_flops(setup))
                    with progress("setting up what is recorded"):
                        recorder = stack.enter_context(closing(Recorder(training, start)))
                    stack.enter_context(workdirs.timed(workdir, "train_seconds"))
                    evaluations = Evaluations(training, start["step"])
                    stack.enter_context(closing(evaluations))
                    # A folder that can't hold a checkpoint fails now, not after an hour.
                    recorder.save(state)
                    if training.should_stop():
                        raise Interrupted(stopped_at(start["step"], config.num_steps, workdir))
                    recorder.draw_beginning(state)
                    train_step = stack.enter_context(
                        profiled(training.profile, workdir, train_step, start["step"])
                    )

                    for step in range(start["step"] + 1, config.num_steps + 1):
                        begun(step)
                        # Metrics of the step before, so that a run that stopped there has them too.
                        if evaluations.due(step - 1):
                            with recorder.aside(state):
                                evaluations.make(state, recorder.writer, begun)
                            recorder.call_back(step - 1, state)
                            if evaluations.out_of_patience():
                                recorder.save(state)
                                break
                        try:
                            batch = next(batches)
                        except UserError:
                            # Saving takes all processes, and the others do not know of the error.
                            if jax.process_count() == 1:
                                recorder.save(state)
                            raise
                        state, metrics = train_step(state, rollbacks.key(step_key, step), batch)
                        stop = training.should_stop() and step < config.num_steps
                        recorder.add(step, metrics)
                        recorder.call_back(step, state)
                        if recorder.due(step, stop):
                            recorder.keep(step, state, stop)
                        if stop:
                            raise Interrupted(stopped_at(step, config.num_steps, workdir))
                break
            except NonFiniteLoss as error:
                trouble = error.with_traceback(None)
            state = metrics = None  # The broken state makes room for a good one.
            roll_back(workdir, checkpoints, trouble, setup.nonfinite.rollbacks)
            restart = restart_step(workdir)
            state, start = restore_or_init(setup, checkpoints, dataset, restart=restart)

    if (last := int(state.step)) < config.num_steps:
        _LOG.info(
            "stopped early, at step %d of %d: %s was no better in %d evaluations",
            *(last, config.num_steps, config.best_by, config.patience_evaluations),
        )
        workdirs.record(workdir, stopped_early={"step": last, "num_steps": config.num_steps})
    with watched(watchdog, workdir, what="checkpoint"):
        checkpoints.wait()  # Only a state that is on disk is evaluated.
    with watched(watchdog, workdir, what="batch of the evaluation") as begun:
        evaluate_once(training, state, begun)
    return state


def _ends_early(training: Training, step: int) -> bool:
    """Whether a run that resumes at a step has ended there, by `config.patience_evaluations`."""
    if not training.setup.config.patience_evaluations:
        return False
    with closing(Evaluations(training, step)) as evaluations:
        return evaluations.out_of_patience()


def evaluate_once(training: Training, state: TrainState, begun: Any = lambda batch: None) -> None:
    """Measures the last step by evaluators and evaluation, unless that was done before."""
    workdir, last = training.workdir, int(state.step)
    with closing(Evaluations(training, last)) as evaluations:
        if evaluations.due(last):
            bar = [ProgressBar(last, last)] if is_first() else []
            writers = [*open_writers(workdir, last), *bar, Onwards(training.trackers)]
            with closing(join(writers)) as writer:
                evaluations.make(state, writer, begun)
    # `experiments.evaluate`, run while this trains, may have evaluated an earlier step.
    if (read_json(workdir / workdirs.EVALUATION) or {}).get("step") != last:
        run = Run(training.setup.parts, state, workdir)
        found = measure(run, training.dataset, should_stop=training.should_stop, begun=begun)
        Onwards(training.trackers).write(last, numbers_of(found))


def numbers_of(evaluation: Mapping[str, Any] | None) -> dict[str, float]:
    """The metrics of an evaluation by name, without their provenance.

    Example:
        >>> numbers_of({"step": 9, "accuracy": 0.5, "recall": {"value": 0.25}, "cmmd": None})
        {'evaluation/accuracy': 0.5, 'evaluation/recall': 0.25}
    """
    found = {}
    for name, each in (evaluation or {}).items():
        value = each if name == "accuracy" else isinstance(each, Mapping) and each.get("value")
        if isinstance(value, int | float) and not isinstance(value, bool):
            found[f"evaluation/{name}"] = float(value)
    return found


def page(workdir: Path) -> Path:
    """Writes the run's page and returns its path."""
    # Imported here: Matplotlib takes seconds to load, and the first step should not wait for it.
    with progress("writing the report"):
        from diffjax.reports.run_page import write_report

        return write_report(workdir)
