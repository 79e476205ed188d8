"""diffjax: diffusion and flow matching as small swappable values.

`train(config, workdir)` runs an experiment, `load(workdir)` brings it back for sampling and
evaluation, `from_pretrained(path)` reads a published network. They are imported on first use, so
that `diffjax.process` and `diffjax.sampling` stay free of Flax, Orbax and the rest.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from diffjax.exchange.pretrained import from_pretrained as from_pretrained
    from diffjax.loop.loop import train as train
    from diffjax.runs.load import load as load

__version__ = "0.1.0"
__all__ = ["__version__", "from_pretrained", "load", "train"]


def __getattr__(name: str) -> Any:
    match name:
        case "from_pretrained":
            from diffjax.exchange.pretrained import from_pretrained as found
        case "load":
            from diffjax.runs.load import load as found
        case "train":
            from diffjax.loop.loop import train as found
        case _:
            raise AttributeError(f"module 'diffjax' has no attribute {name!r}")
    return found


def __dir__() -> list[str]:
    """All public names, for tab completion: also those that are not imported yet."""
    return sorted({*globals(), *__all__} - {"Any", "TYPE_CHECKING"})
