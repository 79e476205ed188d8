"""The objective in the config of a published network that was distilled to few steps."""

from dataclasses import dataclass, replace

from jax.tree_util import register_dataclass

from diffjax.objectives.base import Traits
from diffjax.objectives.denoising import Denoising
from diffjax.process.precond import Meaning


@register_dataclass
@dataclass(frozen=True)
class Distilled(Denoising):
    """A network with a denoiser's target that was distilled to predict the end of the flow.

    Latent consistency models and TCD are: their x0 is where the flow from `x_t` ends, so solvers of
    the ODE and guidance do not suit them. Here it declares that, for weights that others have
    trained. Its loss is a denoiser's: training with it undoes the distillation. The attributes are
    those of `Noising`.

    References:
        Luo et al., "Latent Consistency Models: Synthesizing High-Resolution Images with Few-Step
        Inference", 2023, arXiv:2310.04378
        Zheng et al., "Trajectory Consistency Distillation", 2024, arXiv:2402.19159
    """

    @property
    def traits(self) -> Traits:
        return replace(super().traits, meaning=Meaning.END_OF_FLOW, solver="consistency")
