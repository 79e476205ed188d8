"""Long work says what it does, and how long it still takes."""

import threading
import time

from diffjax.host.progress import Progress, progress


def at(*seconds):
    """A clock that shows these times in turn."""
    times = iter(seconds)
    return lambda: next(times)


def test_the_time_left_leaves_out_the_first_part_once_there_is_a_second():
    """The first of four parts takes 30 s, the others 10 s each: at 45 s, 15 s are left."""
    work = Progress("drawing", 4, at(0.0, 30.0, 32.0, 40.0, 45.0))
    work.at(1)
    assert work.line() == "drawing, 01:28 left"  # three of 30 s, 2 s of which have passed
    work.at(2)
    assert work.line() == "drawing, 00:15 left"


def test_without_a_known_amount_the_line_says_how_long_it_took_so_far():
    work = Progress("compiling", 0, at(0.0, 2.0, 7.0))
    work.at(1, "compiling more")
    assert work.line() == "compiling more, 00:05 so far", "since that began"


def test_a_part_that_takes_longer_than_all_that_was_left_has_no_estimate():
    """A part of 10 s, of which one is left, for 40 s: of the last seconds nobody knows."""
    work = Progress("drawing", 2, at(0.0, 10.0, 20.0, 50.0))
    work.at(1)
    assert work.line() == "drawing, 00:00 left"
    assert work.line() == "drawing, 00:50 so far"


def test_quick_work_says_nothing_and_long_work_does_again_and_again():
    lines, enough = [], threading.Event()

    def log(line):
        lines.append(line)
        if len(lines) == 3:
            enough.set()

    with progress("quick", after_seconds=60.0, log=log):
        pass
    assert lines == []
    with progress("long", after_seconds=0.001, every_seconds=0.001, log=log):
        assert enough.wait(10.0)
    number = len(lines)
    time.sleep(0.01)
    assert len(lines) == number, "after its end it is silent"
    assert all(line == "long, 00:00 so far" for line in lines)
