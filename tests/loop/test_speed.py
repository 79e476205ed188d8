"""Images per second are those of the steps; pauses for pictures and evaluations are left out."""

from types import SimpleNamespace

import numpy as np
import pytest

from diffjax.loop import pending_metrics
from diffjax.loop.pending_metrics import MetricsWindow

STEP_SECONDS, BATCH = 0.5, 16


@pytest.fixture
def devices(monkeypatch):
    """Devices that take half a second a step, and a host that only waits for them."""
    state = SimpleNamespace(now=0.0, end={}, longest=0)

    def is_ready(value):
        return state.end.get(int(value), 0.0) <= state.now

    def wait_for(tree):
        for metrics in tree:
            state.now = max(state.now, state.end.get(int(metrics["loss"]), 0.0))
        return tree

    def begin(step):
        queued = [end for end in state.end.values() if end > state.now]
        state.longest = max(state.longest, len(queued) + 1)
        state.end[step] = max([state.now, *queued]) + STEP_SECONDS
        return {name: np.float32(step) for name in ("loss", "grad_norm", "learning_rate")}

    monkeypatch.setattr(pending_metrics, "is_ready", is_ready)
    monkeypatch.setattr(pending_metrics, "wait_for", wait_for)
    monkeypatch.setattr(pending_metrics.time, "perf_counter", lambda: state.now)
    monkeypatch.setattr(pending_metrics.jax, "device_get", lambda tree: tree)
    state.begin = begin
    return state


class Speeds:
    def __init__(self):
        self.found = []

    def write(self, step, scalars):
        self.found.append(scalars["images_per_second"])

    def close(self):
        pass


@pytest.mark.parametrize("pause_every", [3, 7, 1000])
def test_pauses_do_not_count(devices, pause_every):
    speeds = Speeds()
    window = MetricsWindow(speeds, BATCH, 0, lambda: [])
    for step in range(1, 61):
        window.add(devices.begin(step))
        if step % 5 == 0:
            window.close()
        if step % pause_every == 0:
            window.flush()
            devices.now += 100.0  # a picture
            window.restart_clock()
    measured = [speed for speed in speeds.found if speed]
    assert len(measured) >= 6
    assert measured == pytest.approx([BATCH / STEP_SECONDS] * len(measured))


def test_a_stop_waits_for_few_queued_steps(devices):
    """Windows of 50 steps, 25 s each: at most eight steps are queued, which take 4 s."""
    window = MetricsWindow(Speeds(), BATCH, 0, lambda: [])
    for step in range(1, 151):
        window.add(devices.begin(step))
        assert window.finished() >= step - 8
        if step % 50 == 0:
            window.close()
    assert devices.longest == 9  # the one that begins, too
