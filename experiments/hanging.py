"""Flags of the watchdog, for every program that may stand still."""

from types import SimpleNamespace

from absl import flags

from diffjax.host.watchdog import Watchdog


def define(flag_values: flags.FlagValues) -> None:
    """Adds them."""
    flags.DEFINE_float(
        "hang_seconds", Watchdog.seconds, "without a step that are a hang; 0 never",
        lower_bound=0.0, flag_values=flag_values,
    )  # fmt: skip
    flags.DEFINE_float(
        "hang_times", Watchdog.times, "and no less than that many times a step's time",
        lower_bound=0.0, flag_values=flag_values,
    )  # fmt: skip
    flags.DEFINE_bool(
        "hang_exits", Watchdog.exits, "end a run that hangs, with status 75; else only tell",
        flag_values=flag_values,
    )  # fmt: skip


def watchdog(args: SimpleNamespace) -> Watchdog:
    """What they say."""
    return Watchdog(args.hang_seconds, args.hang_times, args.hang_exits)
