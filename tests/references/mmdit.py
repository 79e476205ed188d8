"""Outputs of the transformers of SD3 and Flux of diffusers for drawn parameters, as arrays.

    python -m tests.references.mmdit     # writes mmdit.npz beside this file

It needs torch and diffusers.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from diffjax.models.flux.published import DIFFUSERS as FLUX
from diffjax.models.flux2.published import DIFFUSERS as FLUX2
from diffjax.models.sd3.published import DIFFUSERS as SD3
from diffjax.pretrained.family import Family
from tests.references.dit import drawn

FILE = Path(__file__).parent / "mmdit.npz"
_SD3 = {
    "channels": 4, "hidden_size": 16, "depth": 4, "num_heads": 2, "stored_positions": 9,
    "context_width": 6, "pooled_width": 5, "side": 16,
}  # fmt: skip
_FLUX = {
    "channels": 4, "hidden_size": 16, "depth": 2, "single_depth": 2, "num_heads": 2,
    "rotary_axes": (2, 2, 4), "context_width": 6, "pooled_width": 5,
}  # fmt: skip
_FLUX2 = {
    "channels": 8, "hidden_size": 32, "depth": 2, "single_depth": 2, "num_heads": 2,
    "rotary_axes": (4, 4, 4, 4), "context_width": 6,
}  # fmt: skip
CASES: Mapping[str, tuple[Family, Mapping[str, Any]]] = {
    "SD3": (SD3, _SD3),
    "SD3.5": (SD3, _SD3 | {"qk_norm": True, "dual_blocks": 2}),
    "Flux.1 schnell": (FLUX, _FLUX | {"length": 256}),
    "Flux.1 dev": (FLUX, _FLUX | {"embedded_guidance": 3.5}),
    "Flux.1 Fill": (FLUX, _FLUX | {"embedded_guidance": 30.0, "beside_channels": 3}),
    "Flux.2 dev": (FLUX2, _FLUX2 | {"embedded_guidance": 4.0}),
    "Flux.2 klein": (FLUX2, _FLUX2),
}
"""Families and settings of our networks; those of diffusers are in `Config` of the families."""
TIMES = np.array([3.0, 90.0, 400.0], np.float32)
BATCH, HEIGHT, WIDTH, LENGTH = len(TIMES), 8, 12, 5


class Inputs(NamedTuple):
    """What a network is evaluated with; of the condition what it takes."""

    images: np.ndarray
    states: np.ndarray
    pooled: np.ndarray
    guidance: np.ndarray
    beside: np.ndarray


def inputs(settings: Mapping[str, Any]) -> Inputs:
    """Drawn inputs; guidance scales are small, since frequencies are rounded otherwise by torch."""
    random = np.random.default_rng(0)
    shapes = (
        (BATCH, HEIGHT, WIDTH, settings["channels"]),
        (BATCH, LENGTH, settings["context_width"]),
        (BATCH, settings.get("pooled_width", 0)),
        (BATCH, 1 if settings.get("embedded_guidance") else 0),
        (BATCH, HEIGHT, WIDTH, settings.get("beside_channels", 0)),
    )
    drawn = [random.normal(size=shape).astype(np.float32) for shape in shapes]
    drawn[3] = 0.1 * np.abs(drawn[3])
    return Inputs(*drawn)


def state_of(peer: Any) -> dict[str, np.ndarray]:
    """The drawn parameters, and positions, of a network of diffusers."""
    return drawn({name: tuple(x.shape) for name, x in peer.state_dict().items()})


def theirs(name: str) -> tuple[Any, Callable[..., Any]]:
    """The network of diffusers with drawn parameters in float64, and its evaluation.

    The evaluation takes `Inputs` of torch and returns `[B, H, W, C]`.
    """
    import diffusers
    import torch

    family, settings = CASES[name]
    assert family.config
    network = family.network(**settings)
    kind = getattr(diffusers, family.config.class_name)
    peer = kind.from_config(family.config.entries(network)).double()
    peer.load_state_dict({name: torch.tensor(x) for name, x in state_of(peer).items()})
    times = torch.tensor(TIMES).double()
    patch, axes = network.network.patch_size, len(network.network.rotary_axes)

    def of_sd3(given: Inputs) -> Any:
        images, states, pooled, *_ = given
        return peer(_first(images), states, pooled, times).sample.permute(0, 2, 3, 1)

    def of_flux(given: Inputs) -> Any:
        # The packing of the pipelines: channel, row and column of a patch.
        both = torch.cat([given.images, given.beside], -1)
        rows, columns = HEIGHT // patch, WIDTH // patch
        packed = both.view(BATCH, rows, patch, columns, patch, -1).permute(0, 1, 3, 5, 2, 4)
        positions = torch.zeros(rows, columns, axes)
        positions[..., 1] = torch.arange(rows)[:, None]
        positions[..., 2] = torch.arange(columns)[None]
        of_text = torch.zeros(LENGTH, axes)
        if axes > 3:
            of_text[:, 3] = torch.arange(LENGTH)
        more = {"guidance": given.guidance[:, 0]} if given.guidance.shape[-1] else {}
        if given.pooled.shape[-1]:
            more["pooled_projections"] = given.pooled
        out = peer(
            packed.reshape(BATCH, rows * columns, -1),
            encoder_hidden_states=given.states,
            timestep=times / 1000,
            img_ids=positions.reshape(-1, axes),
            txt_ids=of_text,
            **more,
        ).sample
        out = out.view(BATCH, rows, columns, -1, patch, patch).permute(0, 1, 4, 2, 5, 3)
        return out.reshape(BATCH, HEIGHT, WIDTH, -1)

    return peer, of_flux if axes else of_sd3


def _first(images: Any) -> Any:
    return images.permute(0, 3, 1, 2)


def main() -> None:
    """Evaluates the networks of diffusers."""
    import torch

    found = {}
    for name, (_, settings) in CASES.items():
        peer, evaluate = theirs(name)
        given = Inputs(*(torch.tensor(x).double() for x in inputs(settings)))
        with torch.inference_mode():
            found[name] = evaluate(given).numpy().astype(np.float32)
        for key, x in state_of(peer).items():
            assert x.any(), key
    np.savez_compressed(FILE, **found)


if __name__ == "__main__":
    main()
