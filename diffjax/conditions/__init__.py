"""Conditions: what samples are conditioned on, as arrays and as values that know these arrays.

The condition of n examples is a tree of arrays with the batch axis first. A `Condition` is a frozen
dataclass that knows such trees: their shapes, their null, how they are read and written.
"""

from diffjax.conditions.base import Condition as Condition
from diffjax.conditions.classes import Classes as Classes
from diffjax.conditions.classes import Unconditional as Unconditional
from diffjax.conditions.classes import of_classes as of_classes
