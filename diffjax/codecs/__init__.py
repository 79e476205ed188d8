"""Codecs: maps from images to the latents that a model is trained on, and back.

A `Codec` is a frozen dataclass on the data set, `Identity` for images as they are. Networks,
objectives and solvers see latents alone; pictures and evaluation see decoded images alone.
"""

from diffjax.codecs.base import Codec as Codec
from diffjax.codecs.base import Identity as Identity
from diffjax.codecs.base import Posterior as Posterior
from diffjax.codecs.base import Unstated as Unstated
from diffjax.codecs.scaled import ScaledLatents as ScaledLatents
from diffjax.codecs.space_to_depth import SpaceToDepth as SpaceToDepth
from diffjax.codecs.tiled import Tiled as Tiled
