"""What the names of emoji say, and which compositions of it a model is not trained on.

    "woman astronaut medium-dark skin tone"     woman, astronaut, medium-dark
    "green heart"                               green, heart

A composition is held out where training has both of its parts, but never together: green circles
and red hearts, but no green heart.
"""

import re
from collections.abc import Mapping
from typing import NamedTuple

COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "brown", "black", "white")
THINGS = ("heart", "circle", "square", "book")
TONES = ("light", "medium-light", "medium", "medium-dark", "dark")
ANIMALS = (
    *("bear", "cat", "chick", "chicken", "cow", "dog", "dragon", "fox", "frog", "goat", "hamster"),
    *("horse", "koala", "lion", "monkey", "mouse", "ox", "panda", "pig", "rabbit", "rat", "tiger"),
    *("unicorn", "wolf"),
)
_COLOURED = re.compile(rf"({'|'.join(COLOURS)})(?: large)? ({'|'.join(THINGS)})")
_TONE = re.compile(rf" ({'|'.join(TONES)}) skin tone")

HELD_OUT_NAMES = (
    "green heart",
    "orange heart",
    "purple circle",
    "yellow circle",
    "blue square",
    "brown square",
    "blue book",
    "crying cat",
    "cat with tears of joy",
    "rabbit face",
    "cow face",
)
"""A colour and a thing; an animal and a face."""
HELD_OUT_TONES: Mapping[str, str] = {
    "artist": "light",
    "astronaut": "medium-dark",
    "cook": "dark",
    "detective": "medium",
    "elf": "medium-light",
    "farmer": "medium-dark",
    "firefighter": "medium",
    "health worker": "light",
    "judge": "dark",
    "mechanic": "medium-light",
    "pilot": "medium",
    "scientist": "dark",
    "singer": "medium-light",
    "student": "light",
    "teacher": "medium-dark",
    "technologist": "light",
    "vampire": "dark",
}
"""A role and a skin tone, of women, men and persons."""
HELD_OUT_ROLES = (
    ("woman", "factory worker"),
    ("man", "office worker"),
    ("woman", "guard"),
    ("man", "fairy"),
    ("woman", "police officer"),
    ("man", "golfing"),
)
"""Woman or man and a role, in all skin tones."""


class Parts(NamedTuple):
    """What a name says; "" where it says nothing.

    Attributes:
        colour: the colour of a thing of one colour.
        thing: that has it.
        who: `woman` or `man`.
        role: what they are or do; of a name without tone and who, all of it.
        tone: the skin tone, where there is one.
    """

    colour: str
    thing: str
    who: str
    role: str
    tone: str


def parts_of_name(name: str) -> Parts:
    """The parts of an emoji's name.

    Example:
        >>> parts_of_name("woman astronaut medium-dark skin tone")
        Parts(colour='', thing='', who='woman', role='astronaut', tone='medium-dark')
        >>> parts_of_name("black large square")[:2]
        ('black', 'square')
    """
    coloured = _COLOURED.fullmatch(name)
    tones = _TONE.findall(name)
    role = _TONE.sub("", name)
    first, _, rest = role.partition(" ")
    who, role = (first, rest) if first in ("woman", "man") and rest else ("", role)
    colour, thing = coloured.groups() if coloured else ("", "")
    return Parts(colour, thing, who, role, tones[0] if len(tones) == 1 else "")


def attributes_of(name: str, group: str) -> dict[str, str]:
    """What classifiers can see of what a name says, by attribute; empty ones are left out.

    Args:
        name: the name of the emoji.
        group: that it is listed in, such as "Food & Drink".

    Example:
        >>> attributes_of("crying cat", "Smileys & Emotion")
        {'face or animal': 'animal', 'group': 'Smileys & Emotion'}
    """
    parts = parts_of_name(name)
    kind = "animal" if set(name.split()) & {*ANIMALS} else ""
    if not kind and group == "Smileys & Emotion" and "face" in name.split():
        kind = "face"
    found = {
        "colour": parts.colour,
        "skin tone": parts.tone,
        "face or animal": kind,
        "group": group,
    }
    return {attribute: value for attribute, value in found.items() if value}


def held_out(name: str) -> bool:
    """Whether an emoji of this name is a composition for testing.

    Example:
        >>> [held_out(name) for name in ("green heart", "green circle", "man guard")]
        [True, False, False]
    """
    parts = parts_of_name(name)
    return (
        name in HELD_OUT_NAMES
        or (parts.who, parts.role) in HELD_OUT_ROLES
        or (bool(parts.tone) and HELD_OUT_TONES.get(parts.role) == parts.tone)
    )
