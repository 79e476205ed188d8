"""The writers of metrics: what is written reads back, and a resumed run leaves no duplicates."""

import io
import json
import math
import resource
import struct
import threading

import numpy as np
import pytest
from tensorboardX.proto.event_pb2 import Event  # pyright: ignore[reportAttributeAccessIssue]

from diffjax.errors import UserError
from diffjax.loop.logging import (
    JSONLWriter,
    ProgressBar,
    TensorBoardWriter,
    join,
    read_metrics,
)

SCALARS = {"learning_rate": 1e-3, "loss": 0.1 + 0.2, "loss_by_log_snr/-inf": 0.7}


def _write(path, steps, start_step=0):
    writer = JSONLWriter(path, start_step)
    for step in steps:
        writer.write(step, {"loss": 1.0 / step, "from": start_step})
    writer.close()


def test_jsonl_has_step_and_loss_first_and_reads_back_exactly(tmp_path):
    path = tmp_path / "run" / "metrics.jsonl"
    writer = JSONLWriter(path)
    writer.write(10, SCALARS)
    line = path.read_text()  # before it is closed: each line is flushed
    writer.close()
    assert line.startswith('{"step": 10, "loss": ')
    assert line.endswith("}\n")
    assert read_metrics(path) == [{"step": 10, **SCALARS}]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_jsonl_of_non_finite_numbers_is_valid_json(tmp_path, value):
    path = tmp_path / "metrics.jsonl"
    writer = JSONLWriter(path)
    writer.write(1, {"loss": np.float32(value)})
    writer.close()

    def reject(constant):
        raise AssertionError(f"{constant} is not JSON")

    stored = json.loads(path.read_text(), parse_constant=reject)["loss"]
    assert np.array_equal(float(stored), value, equal_nan=True)
    (record,) = read_metrics(path)
    assert isinstance(record["loss"], float)
    assert np.array_equal(record["loss"], value, equal_nan=True)


@pytest.mark.parametrize("torn", [b"", b'{"step": 50, "lo', b'{"step": 50', b"\x00\x00"])
def test_resuming_drops_later_steps_and_a_torn_line(tmp_path, torn):
    path = tmp_path / "metrics.jsonl"
    _write(path, [10, 20, 30, 40])
    path.write_bytes(path.read_bytes() + torn)
    assert [record["step"] for record in read_metrics(path)] == [10, 20, 30, 40]

    _write(path, [30, 40, 50], start_step=20)
    records = read_metrics(path)
    assert [record["step"] for record in records] == [10, 20, 30, 40, 50]
    assert [record["from"] for record in records] == [0, 0, 20, 20, 20]
    assert [file.name for file in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_whole_last_line_without_its_newline_is_kept(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 10, "loss": 1.0}')
    _write(path, [20], start_step=10)
    assert [record["step"] for record in read_metrics(path)] == [10, 20]


def test_damage_before_the_last_line_is_named_and_left_alone(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 10}\nrubbish\n{"step": 30}\n')
    with pytest.raises(UserError, match=r"metrics\.jsonl, line 2"):
        JSONLWriter(path, start_step=10)
    assert path.read_text() == '{"step": 10}\nrubbish\n{"step": 30}\n'


def test_no_file_has_no_records(tmp_path):
    assert read_metrics(tmp_path / "metrics.jsonl") == []


def _events(folder):
    """The events of a folder by the TFRecord layout: length u64, crc u32, data, crc u32."""
    for file in sorted(folder.iterdir(), key=lambda file: file.name.split(".from_")[-1]):
        content = file.read_bytes()
        while content:
            (length,) = struct.unpack("<Q", content[:8])
            yield Event.FromString(content[12 : 12 + length])
            content = content[16 + length :]


def test_tensorboard_holds_the_same_numbers(tmp_path):
    writer = join([JSONLWriter(tmp_path / "metrics.jsonl"), TensorBoardWriter(tmp_path / "tb")])
    writer.write(10, SCALARS)
    writer.write(20, {"loss": 0.25})
    writer.close()
    in_events = [
        (event.step, value.tag, value.simple_value)
        for event in _events(tmp_path / "tb")
        for value in event.summary.value
    ]
    in_lines = [
        (record["step"], name, float(np.float32(value)))
        for record in read_metrics(tmp_path / "metrics.jsonl")
        for name, value in record.items()
        if name != "step"
    ]
    assert sorted(in_events) == sorted(in_lines)
    assert len(in_events) == 4


def test_tensorboard_resume_keeps_the_old_file_and_purges_the_repeated_steps(tmp_path):
    for start_step in (0, 20):
        writer = TensorBoardWriter(tmp_path, start_step)
        writer.write(30, {"loss": 1.0})
        writer.close()
    events = list(_events(tmp_path))
    assert [e.step for e in events if e.summary.value] == [30, 30]
    # TensorBoard hides whatever older files hold at or after the step of a START event.
    starts = [e.step for e in events if e.session_log.status == e.session_log.START]
    assert starts == [1, 21]


def write_on(writer):
    for step in range(1000):
        writer.write(step, SCALARS)


def test_a_full_disk_is_an_error_of_tensorboard_and_holds_up_nothing(tmp_path):
    """The limit of a file's size, which the system refuses to exceed as it does on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    threads = threading.active_count()
    writer = TensorBoardWriter(tmp_path)
    assert threading.active_count() == threads
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            write_on(writer)
        with pytest.raises(OSError, match="File too large"):
            writer.close()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


class _Terminal(io.StringIO):
    def isatty(self):
        return True


def test_the_bar_shows_loss_speed_and_time_left_on_a_terminal():
    stream = _Terminal()
    bar = ProgressBar(total_steps=100, start_step=40, stream=stream)
    bar.write(100, {"loss": 0.125, "images_per_second": 1234.4})
    bar.close()
    assert "step 40/100" in stream.getvalue()
    last = stream.getvalue().split("\r")[-1]
    for part in ("step 100/100", "loss 0.1250", "1,234 images/s", "left"):
        assert part in last


def test_without_a_terminal_a_plain_line_comes_every_interval_and_at_the_end():
    stream, now = io.StringIO(), [0.0]
    bar = ProgressBar(100, stream=stream, interval_seconds=10.0, clock=lambda: now[0])
    for step in range(1, 101):
        now[0] = step * 0.3
        bar.write(step, {"loss": 0.5, "images_per_second": 80})
    bar.close()
    assert stream.getvalue().splitlines() == [
        "step 34/100, loss 0.5000, 80 images/s, 00:20 left",
        "step 68/100, loss 0.5000, 80 images/s, 00:10 left",
        "step 100/100, loss 0.5000, 80 images/s, 00:00 left",
    ]


def test_what_comes_before_the_first_step_is_no_part_of_the_time_left():
    """A first checkpoint of 300 s, then steps of a second; of one step alone nothing follows."""
    stream, now = io.StringIO(), [0.0]
    bar = ProgressBar(100, stream=stream, interval_seconds=10.0, clock=lambda: now[0])
    for seconds, step in [(100.0, 0), (300.0, 0), (301.0, 1), (311.0, 11)]:
        now[0] = seconds
        bar.beat(step)
    assert stream.getvalue().splitlines() == ["step 1/100", "step 11/100, 01:29 left"]


def test_steps_between_two_lines_are_shown_if_these_are_far_apart():
    stream, now = io.StringIO(), [0.0]
    bar = ProgressBar(100, stream=stream, interval_seconds=10.0, clock=lambda: now[0])
    for seconds, step in [(5.0, 5), (10.0, 10), (15.0, 12), (25.0, 12), (30.0, 12), (40.0, 20)]:
        now[0] = seconds
        bar.beat(step)
    assert stream.getvalue().splitlines() == [
        "step 10/100, 01:30 left",
        # Since step 5: 20 s for 7 steps, 35 s for 15.
        "step 12/100, 04:11 left",
        "step 20/100, 03:07 left",
    ]
    terminal = _Terminal()
    bar = ProgressBar(100, stream=terminal, interval_seconds=0.0, clock=lambda: now[0])
    bar.write(10, {"loss": 0.125})
    bar.beat(30)
    bar.close()
    assert "step 30/100" in terminal.getvalue().split("\r")[-1]


@pytest.mark.parametrize("stream", [io.StringIO(), _Terminal()])
def test_each_metric_of_an_evaluator_is_a_line_at_once(stream):
    bar = ProgressBar(100, stream=stream, clock=lambda: 0.0)
    bar.write(40, {"eval/samples/frechet_distance": 1.25, "eval/samples/accuracy": 0.5})
    bar.close()
    line = "step 40/100, samples/frechet_distance 1.25, samples/accuracy 0.5\n"
    assert line in stream.getvalue()


def test_metrics_without_a_loss_are_fine_everywhere(tmp_path):
    bar = ProgressBar(2, stream=io.StringIO(), interval_seconds=0.0)
    writer = join([bar, JSONLWriter(tmp_path / "metrics.jsonl")])
    writer.write(2, {"accuracy": 0.5})
    writer.close()
    assert read_metrics(tmp_path / "metrics.jsonl") == [{"step": 2, "accuracy": 0.5}]


def test_join_writes_in_order_and_closes_all_though_one_fails():
    log = []

    class Recorder:
        def __init__(self, name, fails=False):
            self.name, self.fails = name, fails

        def write(self, step, scalars):
            log.append((self.name, step, scalars["loss"]))

        def close(self):
            log.append((self.name, "closed"))
            if self.fails:
                raise OSError("disk full")

    writer = join([Recorder("a"), Recorder("b", fails=True)])
    writer.write(3, {"loss": 0.5})
    with pytest.raises(OSError, match="disk full"):
        writer.close()
    assert log == [("a", 3, 0.5), ("b", 3, 0.5), ("b", "closed"), ("a", "closed")]
