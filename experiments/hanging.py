"""Flags of the watchdog, for every program that may hang."""

from types import SimpleNamespace

from absl import flags

from diffjax.host.watchdog import Watchdog


def define(flag_values: flags.FlagValues) -> None:
    """Defines the flags of the watchdog."""
    flags.DEFINE_float(
        "hang_seconds", Watchdog.seconds,
        "seconds without a step that are a hang; 0 is off",
        lower_bound=0.0, flag_values=flag_values,
    )  # fmt: skip
    flags.DEFINE_float(
        "hang_times", Watchdog.times,
        "a hang is at least this many mean step times",
        lower_bound=0.0, flag_values=flag_values,
    )  # fmt: skip
    flags.DEFINE_bool(
        "hang_exits", Watchdog.exits, "end a hanging run (status 75)",
        flag_values=flag_values,
    )  # fmt: skip


def watchdog(args: SimpleNamespace) -> Watchdog:
    """Builds the watchdog from the values of its flags."""
    return Watchdog(args.hang_seconds, args.hang_times, args.hang_exits)
