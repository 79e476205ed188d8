"""The names of ImageNet's 1,000 classes."""

from functools import cache
from pathlib import Path

_FILE = Path(__file__).with_name("imagenet_classes.txt")


@cache
def label_names() -> tuple[str, ...]:
    """The names of the classes of ILSVRC2012 in the order of their labels, synonyms after commas.

    The order is that of WordNet's identifiers, which published networks are trained with. The
    names are WordNet's.

    Example:
        >>> names = label_names()
        >>> len(names), names[207], names[360], names[980]
        (1000, 'golden retriever', 'otter', 'volcano')
    """
    return tuple(_FILE.read_text("utf-8").splitlines())
