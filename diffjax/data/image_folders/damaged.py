"""Tolerance for a few images that can't be read, in a large data set."""

import logging
from dataclasses import dataclass, field

from diffjax.data.sources import Example, Source
from diffjax.errors import UserError

_LOG = logging.getLogger("diffjax")


def passing_over(source: Source, max_damaged: int, where: str) -> Source:
    """The source, with up to `max_damaged` unreadable images replaced; for 0 the source itself.

    Raises:
        UserError: `max_damaged` is negative.
    """
    if max_damaged < 0:
        raise UserError(f"max_damaged={max_damaged} can't be negative")
    return PassingOver(source, max_damaged, where) if max_damaged else source


@dataclass(frozen=True, eq=False, repr=False)
class PassingOver(Source):
    """A source in which unreadable images are replaced by the next readable ones.

    An image for which the inner source raises a `UserError` is replaced by the next image that can
    be read, with that image's label. The result at an index depends on the data alone, so a resumed
    run reads the same images. There is one warning for each damaged image.

    Args:
        source: the inner source, from which images are read one at a time.
        max_damaged: how many images may be unreadable; they are counted since the program started,
            and one more is an error.
        where: the name of the source in errors.
    """

    source: Source
    max_damaged: int
    where: str
    damaged: set[int] = field(default_factory=set, init=False, repr=False)

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Example:
        for row in (*range(index, len(self)), *range(index)):
            try:
                return self.source[row]
            except UserError as error:
                self._pass_over(row, error)
        raise UserError(f"none of the {len(self)} images in {self.where} can be read")

    def _pass_over(self, row: int, error: UserError) -> None:
        if row in self.damaged:
            return
        if len(self.damaged) >= self.max_damaged:
            raise UserError(
                f"{error}; {len(self.damaged)} others can't be read either, and "
                f"data.max_damaged={self.max_damaged}"
            ) from None
        self.damaged.add(row)
        _LOG.warning("%s: another image takes its place (%d so far)", error, len(self.damaged))

    def fingerprint(self) -> str:
        """The fingerprint of the inner source."""
        return self.source.fingerprint()
