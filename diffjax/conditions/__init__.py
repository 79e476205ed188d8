"""Conditions: kinds of inputs that samples are conditioned on, such as classes or token states.

The condition of n examples is a tree of arrays with the batch axis first. A `Condition` is a frozen
dataclass that knows such trees: their shapes, their null, how they are read and written.
"""

from diffjax.conditions.base import Condition as Condition
from diffjax.conditions.base import Rate as Rate
from diffjax.conditions.classes import Classes as Classes
from diffjax.conditions.classes import Unconditional as Unconditional
from diffjax.conditions.classes import of_classes as of_classes
from diffjax.conditions.embeddings import ImageEmbeddings as ImageEmbeddings
from diffjax.conditions.guided import Guided as Guided
from diffjax.conditions.images import Images as Images
from diffjax.conditions.low_resolution import Augmented as Augmented
from diffjax.conditions.low_resolution import LowResolution as LowResolution
from diffjax.conditions.masked_images import KeptLatents as KeptLatents
from diffjax.conditions.masked_images import MaskedImages as MaskedImages
from diffjax.conditions.numbers import Numbers as Numbers
from diffjax.conditions.several import Several as Several
from diffjax.conditions.tokens import Tokens as Tokens
from diffjax.conditions.tokens import TokenStates as TokenStates
