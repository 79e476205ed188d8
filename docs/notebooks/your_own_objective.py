# %% [markdown]
# # Your own objective, verified before training
#
# A training run with a wrong loss looks like any other run: the loss falls, and the samples are a little bad. For simple
# data the best denoiser is known in closed form, so the question "is my loss smallest at the best denoiser?" has an
# answer in seconds. `verify_objective` returns it.

# %%
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
from diffjax.objectives.base import Objective
from diffjax.oracle.verify import verify_objective
from diffjax.process import targets
from diffjax.process.paths import Cosine, Pair, Path, coeffs, log_snr, mix
from diffjax.process.precond import Precond, TimeLabel, denoiser
from jax.tree_util import register_dataclass

# %% [markdown]
# ## The loss
#
# An objective is a frozen dataclass with one method. It mixes noise into a batch and returns one loss for each example.
# `denoiser` turns the network's output, whatever its target is, into the predicted clean image and noise. This one adds
# the squared errors of both:
#
#     loss = mean_pixels (x0_hat − x0)² + (eps_hat − eps)²


# %%
@register_dataclass
@dataclass(frozen=True)
class BothErrors(Objective):
    """The distance of x0 and noise from the truth, to a power: 2 is the squared error."""

    path: Path
    precond: Precond
    power: float = 2.0

    def __call__(self, apply, params, teacher_params, key, batch, progress):
        time_key, noise_key = jax.random.split(key)
        x0 = batch["image"]
        t = jax.random.uniform(time_key, len(x0), minval=0.001, maxval=0.999)
        pair = Pair(x0, jax.random.normal(noise_key, x0.shape))
        x_t = mix(coeffs(self.path, t, x0.ndim), pair)
        guess = denoiser(apply, params, self.path, self.precond)(x_t, t, batch["cond"])
        squares = jnp.square(guess.x0 - pair.x0) + jnp.square(guess.eps - pair.eps)
        distance = jnp.sqrt(jnp.mean(squares, axis=tuple(range(1, x0.ndim))))
        return distance**self.power, {"log_snr": log_snr(self.path, t)}


# %% [markdown]
# ## The check
#
# The data are a mixture of three Gaussians in two dimensions, whose best denoiser is exact. The network is replaced by
# this prediction plus small deviations, one for each of eight directions. Where the loss is right, its gradient along each
# of them is zero, within the error of estimating it: `z` is the gradient in units of that error.

# %%
mine = BothErrors(Cosine(), Precond(targets.V(), TimeLabel()))
print(verify_objective(mine))

# %% [markdown]
# The last line says how small an error of the prediction would have been found.
#
# Now the same with the distance in place of its square. It looks harmless, and many losses do it for robustness:

# %%
found = verify_objective(replace(mine, power=1.0))
print(found)

# %% [markdown]
# It fails, and says where and by how much: the minimum of a distance is a median, and the median of what an image may have
# been is not its mean. Samplers need the mean. A network that is trained so would be wrong by this much, with perfect
# training.

# %%
print(f"passed: {found.passed}")
print(f"the minimum is {found.offset[found.worst]:.0%} from the best prediction")

# %% [markdown]
# ## Next
#
# - [Change one idea](../extending.md#an-objective) makes of a class a part that configs name and train.
# - [Exact solutions](../oracle.md) has the mathematics of the check, and what it can't find.
