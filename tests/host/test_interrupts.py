"""A stop is obeyed at once, also while arrays are computed and programs compiled."""

import os
import signal
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffjax.host.interrupts import (
    Interrupted,
    interruptible,
    is_ready,
    stop_at_once,
    stop_signals,
    wait_for,
)


def signal_soon(number=signal.SIGTERM, seconds=0.05):
    timer = threading.Timer(seconds, lambda: os.kill(os.getpid(), number))
    timer.start()
    return timer


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_work_without_steps_ends_at_a_signal_and_the_handlers_are_put_back(number):
    before = [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)]
    found = []

    def sleep():
        with stop_signals() as should_stop, stop_at_once("stopped while sleeping"):
            found.append(should_stop)
            signal_soon(number)
            time.sleep(30.0)

    with pytest.raises(Interrupted, match="stopped while sleeping") as stopped:
        sleep()
    assert stopped.value.signal == number
    assert found[0]()
    assert [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)] == before


def test_outside_of_it_a_signal_is_only_noted():
    with stop_signals() as should_stop:
        with stop_at_once("never"):
            pass
        os.kill(os.getpid(), signal.SIGTERM)
        assert should_stop()


def test_without_handlers_of_a_run_ctrl_c_is_what_it_is_elsewhere(request):
    # A shell's background jobs ignore it.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, before))

    def sleep():
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(30.0)

    with pytest.raises(KeyboardInterrupt) as stopped, stop_at_once("stopped"):
        sleep()
    assert type(stopped.value) is KeyboardInterrupt


def test_threads_leave_signals_alone():
    found = []

    def run():
        with stop_at_once("stopped"):
            found.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert found == [signal.getsignal(signal.SIGINT)]


def test_what_is_interruptible_returns_raises_and_is_left_behind():
    assert interruptible(lambda: 3) == 3
    with pytest.raises(ZeroDivisionError):
        interruptible(lambda: 1 // 0)
    over = threading.Event()

    def compile_for_long():
        signal_soon()
        interruptible(lambda: over.wait(30.0))

    with pytest.raises(Interrupted), stop_signals(), stop_at_once("stopped while compiling"):
        compile_for_long()
    over.set()


def test_waiting_returns_what_is_computed():
    x = {"a": jnp.arange(3.0) + 1, "b": np.ones(2)}
    assert wait_for(x) is x
    assert all(map(is_ready, jax.tree.leaves(x)))
