"""A few images that can't be read, in a set of many."""

import logging
from dataclasses import dataclass, field

from diffjax.data.fingerprints import earlier_fingerprint
from diffjax.data.sources import Example, Source
from diffjax.errors import UserError

_LOG = logging.getLogger("diffjax")


def passing_over(source: Source, max_damaged: int, where: str) -> Source:
    """The source, with up to `max_damaged` images passed over; 0: itself.

    Raises:
        UserError: a negative number.
    """
    if max_damaged < 0:
        raise UserError(f"max_damaged={max_damaged} can't be negative")
    return PassingOver(source, max_damaged, where) if max_damaged else source


@dataclass(frozen=True, eq=False, repr=False)
class PassingOver(Source):
    """Another source, of which some images can't be read.

    In the place of an image for which it raises a `UserError` comes the next one for which it does
    not, with its own label: what comes at an index depends on the data alone, so a run that is
    resumed sees the same. Each is warned of once.

    Args:
        source: asked for one image at a time.
        max_damaged: how many images may be unreadable, counted as they are met since the program
            began; the first one more is an error.
        where: what to call the source in an error.
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
        """That of the other source."""
        return self.source.fingerprint()

    def earlier_fingerprint(self) -> str:
        """That of the other source."""
        return earlier_fingerprint(self.source)
