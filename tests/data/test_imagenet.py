"""ImageNet's classes by name."""

import pytest

from diffjax.conditions import Classes
from diffjax.data.imagenet import label_names
from diffjax.errors import UserError

CLASSES = Classes(1000, label_names())


def test_labels_of_the_published_samples_have_their_names():
    """The eight of DiT's and SiT's `sample.py`, and others that are well known."""
    published = {
        "golden retriever": 207,
        "otter": 360,
        "red panda": 387,
        "geyser": 974,
        "macaw": 88,
        "valley": 979,
        "balloon": 417,
        "Arctic fox": 279,
    }
    known = {"tench": 0, "tabby": 281, "volcano": 980, "toilet tissue": 999, "sea slug": 115}
    names = published | known
    assert CLASSES.parse([*names]).tolist() == [*names.values()]
    assert len(label_names()) == 1000


def test_a_label_has_the_first_of_its_names_as_title():
    assert CLASSES.titles([387, 1000]) == ["lesser panda", ""]


def test_what_is_the_name_of_no_class_or_of_two_is_refused():
    with pytest.raises(UserError, match="did you mean 'golden retriever'"):
        CLASSES.parse(["golden retreiver"])
    with pytest.raises(UserError, match=r"called 'crane': 134 \(crane\), 517 \(crane\); pass the"):
        CLASSES.parse(["crane"])
    with pytest.raises(UserError, match=r"and [0-9,]+ more$"):  # not all of them
        CLASSES.parse(["0x"])


def test_a_name_goes_before_a_synonym():
    """`tub` is a name of 876, and one of the synonyms of 435, a bathtub."""
    assert CLASSES.parse(["tub", "giant panda", "134"]).tolist() == [876, 388, 134]
