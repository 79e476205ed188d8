"""Non-leaky augmentation: images are transformed, and the network is conditioned on how."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.scipy.ndimage import map_coordinates
from jax.tree_util import register_dataclass
from jaxtyping import Bool, Float

from diffjax.errors import UserError
from diffjax.kinds import NotNegative, Probability
from diffjax.objectives.base import Batch, Objective, Progress
from diffjax.objectives.wrappers import Wrapper
from diffjax.process.paths import Scalar
from diffjax.process.precond import Apply
from diffjax.shapes import Images, OneKey, PerSample

# The low-pass filter of the wavelet "sym6" (Daubechies 1992): with its mirror image it enlarges
# images by two and makes them small again without a change.
_SYM6 = np.array(
    [
        *(0.015404109327027373, 0.0034907120842174702, -0.11799011114819057),
        *(-0.048311742585633, 0.4910559419267466, 0.787641141030194, 0.3379294217276218),
        *(-0.07263752278646252, -0.021060292512300564, 0.04472490177066578),
        *(0.0017677118642428036, -0.007800708325034148),
    ],
    np.float32,
)
_MARGIN = len(_SYM6) // 4


class Change(NamedTuple):
    """How images are changed, one number or two for each; zeros change nothing.

    Attributes:
        flips: from left to right, and from top to bottom.
        scale: the log of the scale, in units of `scale_std` and to the base 2.
        angle: the angle of the rotation.
        stretch: as `scale`, along one direction, and the inverse across it.
        direction: the angle of that direction.
        shift: to the right and down, in units of `shift_std` of the image's width and height.
    """

    flips: Bool[Array, " batch 2"]
    scale: PerSample
    angle: PerSample
    stretch: PerSample
    direction: PerSample
    shift: Float[Array, " batch 2"]

    @property
    def labels(self) -> Float[Array, " batch numbers"]:
        """What the network has as a condition, nine numbers an image; 0 for no change."""
        parts = (
            self.scale,
            jnp.cos(self.angle) - 1.0,
            jnp.sin(self.angle),
            self.stretch * jnp.cos(self.direction),
            self.stretch * jnp.sin(self.direction),
        )
        flips = self.flips.astype(jnp.float32)
        return jnp.concatenate([flips, jnp.stack(parts, axis=1), self.shift], axis=1)


@register_dataclass
@dataclass(frozen=True)
class NonLeaky(Wrapper):
    """EDM's augmentation of small data sets: flips, scales, rotations, stretches and shifts.

    Each kind of change is made with probability p, and each image is flipped from left to right
    with probability ½. The network has the change as a condition, `Change.labels`. Samples are
    drawn with the labels of no change, so no change leaks into them. The loss is that of the
    changed image:

        loss(T(x0) | cond, labels of T)        T drawn anew for each image and step

    A changed image is interpolated at twice the resolution, between a wavelet's low-pass filters,
    and continues beyond its edge as its mirror image. Karras et al. 2022 (arXiv:2206.00364),
    appendix F.2, after Karras et al. 2020 (arXiv:2006.06676).

    The network has to take the numbers: a `UNet` with `embedding.augment_dim=9`, as EDM's
    (`model=DDPM++`, `model=NCSN++`); others are refused.

    Attributes:
        objective: the loss.
        probability: p; 0.12 for CIFAR-10, 0.15 for FFHQ and AFHQ at 64×64, 0 for flips alone.
        scale_std: the standard deviation of the log of the scale to the base 2; 0.2 in EDM.
        stretch_std: that of a stretch; 0.2.
        shift_std: that of a shift, as a fraction of the image; 0.125.
        rotated_stretches: the probability that a stretch is along any direction, and not along the
            rows; 0.5.
        vertical_flips: the probability of a flip from top to bottom, in units of ½·p; 1 in EDM, 0
            for CIFAR-10 in MeanFlow and SoFlow.
        rotations: that of a rotation, in units of p; 1 in EDM, 0 in the other two.

    Raises:
        UserError: an objective that needs something else in the places of the image: sources,
            features.
    """

    objective: Objective
    probability: Probability[Scalar] = 0.12
    scale_std: NotNegative[Scalar] = 0.2
    stretch_std: NotNegative[Scalar] = 0.2
    shift_std: NotNegative[Scalar] = 0.125
    rotated_stretches: Probability[Scalar] = 0.5
    vertical_flips: Probability[Scalar] = 1.0
    rotations: Probability[Scalar] = 1.0

    def __call__(
        self,
        apply: Apply,
        params: Any,
        teacher_params: Any,
        key: OneKey,
        batch: Batch,
        progress: Progress,
    ) -> tuple[PerSample, dict[str, Array]]:
        if self.traits.needs_source or self.traits.features is not None:
            raise UserError(
                "the wrapper non_leaky changes images alone: an objective with sources or features "
                "of the image can't have it"
            )
        change_key, key = jax.random.split(key)
        change = self.draw(change_key, len(batch["image"]))
        changed = {**batch, "image": self.changed(batch["image"], change)}
        changed["cond"] = with_labels(batch["cond"], change.labels)
        return self.objective(apply, params, teacher_params, key, changed, progress)

    def draw(self, key: OneKey, batch_size: int) -> Change:
        """Changes of as many images."""
        keys = iter(jax.random.split(key, 12))

        def happens(probability: Any = self.probability) -> Array:
            return jax.random.bernoulli(next(keys), probability, (batch_size,))

        def normal() -> Array:
            return jax.random.normal(next(keys), (batch_size,))

        def angle() -> Array:
            return jax.random.uniform(next(keys), (batch_size,), minval=-np.pi, maxval=np.pi)

        down = 0.5 * self.vertical_flips * self.probability
        flips = jnp.stack([happens(0.5), happens(down)], axis=1)
        shift = jax.random.normal(next(keys), (batch_size, 2))
        return Change(
            flips,
            scale=jnp.where(happens(), normal(), 0.0),
            angle=jnp.where(happens(self.rotations * self.probability), angle(), 0.0),
            stretch=jnp.where(happens(), normal(), 0.0),
            direction=jnp.where(happens(self.rotated_stretches), angle(), 0.0),
            shift=jnp.where(happens()[:, None], shift, 0.0),
        )

    def changed(self, images: Images, change: Change) -> Images:
        """The images after these changes: first the flips, then the others at once.

        The pixel at u, from the centre, is that at `A (u - shift)` before,

            A = R(angle) R(-direction) diag(1/f, f) R(direction)/scale        f = 2^(std·stretch)
        """
        right, down = (flip[:, None, None, None] for flip in change.flips.T)
        images = jnp.where(right, images[:, :, ::-1], images)
        images = jnp.where(down, images[:, ::-1], images)
        scale = jnp.exp2(self.scale_std * change.scale)
        factor = jnp.exp2(self.stretch_std * change.stretch)
        stretch = jnp.stack([1.0 / factor, factor], axis=1)[:, :, None] * _turn(change.direction)
        # In half precision, as TPUs multiply by default, pixels at the edge would be misplaced.
        turn = jnp.matmul(_turn(change.angle), _turn(-change.direction), precision="highest")
        matrix = jnp.matmul(turn, stretch, precision="highest") / scale[:, None, None]
        size = jnp.array([images.shape[2], images.shape[1]], jnp.float32)
        return _resampled(images, matrix, self.shift_std * change.shift * size[None])


def with_labels(cond: Any, labels: Float[Array, " batch numbers"]) -> dict[str, Any]:
    """A condition that also has numbers of augmentation, which networks add to their embeddings."""
    parts = cond if isinstance(cond, Mapping) else {"condition": cond}
    return {**parts, "augmentation": labels}


def _turn(angle: PerSample) -> Float[Array, " batch 2 2"]:
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    return jnp.stack([jnp.stack([cos, -sin], axis=1), jnp.stack([sin, cos], axis=1)], axis=1)


def _resampled(
    images: Images, matrix: Float[Array, " batch 2 2"], shift: Float[Array, " batch 2"]
) -> Images:
    """Images whose pixel at u, x before y and from the centre, is that at `matrix (u - shift)`."""
    _, height, width, _ = images.shape
    margins = ((0, 0), (height - 1, height - 1), (width - 1, width - 1), (0, 0))
    fine = jnp.pad(images, margins, mode="reflect")
    for axis in (1, 2):
        fine = _filtered(fine, _SYM6[::-1], axis, up=2, padding=len(_SYM6) // 2)
    # Twice as many pixels as in the image, and some for the filters, in units of its pixels.
    rows, columns = (
        (jnp.arange(2.0 * (size + 2 * _MARGIN)) + 1.0) / 2.0 - (size + 2 * _MARGIN) / 2.0
        for size in (height, width)
    )
    places = jnp.stack(jnp.meshgrid(columns, rows), axis=-1)
    places = places[None] - shift[:, None, None]
    places = jnp.einsum("bij,bhwj->ibhw", matrix, places, precision="highest")
    # From the centre, in pixels of the image, to the index of a pixel of the enlarged one.
    sides = jnp.array([3 * width - 2, 3 * height - 2], jnp.float32)[:, None, None, None]
    x, y = 2.0 * places + sides - 1.0

    def interpolated(image: Array, y: Array, x: Array) -> Array:
        each = jax.vmap(lambda channel: map_coordinates(channel, [y, x], order=1), -1, -1)
        return each(image)

    moved = jax.vmap(interpolated)(fine, y, x)
    for axis in (1, 2):
        moved = _filtered(moved, _SYM6, axis, down=2, padding=len(_SYM6) // 2 - 1)
    return moved[:, _MARGIN:-_MARGIN, _MARGIN:-_MARGIN]


def _filtered(
    images: Images, taps: np.ndarray, axis: int, padding: int, up: int = 1, down: int = 1
) -> Float[Array, " batch rows columns channels"]:
    """Images filtered along one axis, with zeros between their pixels or only every n-th kept."""
    channels = images.shape[-1]
    along = axis - 1
    shape = [1, 1]
    shape[along] = len(taps)
    kernel = jnp.broadcast_to(jnp.asarray(taps).reshape(*shape, 1, 1), (*shape, 1, channels))

    def of(value: int, other: int) -> list[int]:
        return [value if each == along else other for each in range(2)]

    return jax.lax.conv_general_dilated(
        images,
        kernel,
        window_strides=of(down, 1),
        padding=[(each, each) for each in of(padding, 0)],
        lhs_dilation=of(up, 1),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=channels,
        precision="highest",
    )
