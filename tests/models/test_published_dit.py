"""DiT and SiT in the authors' layout, against outputs of their code (tests/references/dit.py)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffjax.models.dit.published import FAMILY
from diffjax.models.sit.published import FAMILY as SIT
from tests.references import dit


@pytest.mark.parametrize("family", [FAMILY, SIT], ids=lambda family: family.name)
def test_outputs_are_those_of_the_authors_code(family):
    with np.load(dit.FOLDER / f"{family.name}.npz", allow_pickle=False) as stored:
        expected, positions = stored["out"], stored["pos_embed"]
    denoiser = family.network(
        (dit.SIDE, dit.SIDE, dit.CHANNELS),
        dit.NUM_CLASSES,
        out_channels=2 * dit.CHANNELS,
        **dit.SETTINGS,
    )
    nothing = jax.tree.map(lambda leaf: np.zeros(leaf.shape), family.shapes(denoiser))
    shapes = {name: array.shape for name, array in family.to_theirs(nothing, denoiser).items()}
    shapes.pop("pos_embed")
    state = dit.drawn(shapes) | {"pos_embed": positions}
    params = family.to_ours(state, denoiser, "theirs")
    out = jax.jit(denoiser.network.apply)(
        {"params": params},
        jnp.asarray(dit.IMAGES),
        jnp.asarray(dit.NOISE_LABELS),
        jnp.asarray(dit.LABELS),
    )
    error = np.linalg.norm(np.asarray(out) - expected) / np.linalg.norm(expected)
    assert expected.std() > 0.1
    assert error < 1e-5


def test_a_file_for_larger_images_is_recognised():
    denoiser = FAMILY.network((64, 64, 4), **FAMILY.sizes["DiT-S/8"].settings)
    nothing = jax.tree.map(
        lambda leaf: np.broadcast_to(np.float32(0), leaf.shape), FAMILY.shapes(denoiser)
    )
    state = FAMILY.to_theirs(nothing, denoiser)
    assert state["pos_embed"].shape == (1, 64, 384)
    assert FAMILY.network_of(state, "x") == denoiser
