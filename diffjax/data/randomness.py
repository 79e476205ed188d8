"""Counter-based random numbers: any part of a stream, without computing the parts before it.

The order of images and the split of a data set must not change with an upgrade of NumPy. NumPy
keeps the output of `random_raw` fixed from version to version, but not its shuffles and
distributions.
"""

import numpy as np

from diffjax.errors import UserError

_WORDS_PER_BLOCK = 4


def random_bits(key: tuple[int, int], first: int, num_words: int) -> np.ndarray:
    """Random words `first` … `first + num_words − 1` of the stream of `key`, by Philox.

    Args:
        key: two integers of 64 bits; different keys have independent streams.
        first: the first word, a multiple of 4, which is Philox's block.
        num_words: the number of words.

    Returns:
        uint64 `[num_words]`.

    Raises:
        UserError: a number of the key is negative or has more than 64 bits.

    Example:
        >>> bool((random_bits((0, 0), 0, 12)[8:] == random_bits((0, 0), 8, 4)).all())
        True

    References:
        Salmon, Moraes, Dror & Shaw, Parallel Random Numbers: As Easy as 1, 2, 3, 2011.
    """
    if not all(0 <= word < 2**64 for word in key):
        raise UserError(f"a seed of data is a number from 0 to 2**64 - 1, not {min(key)}")
    philox = np.random.Philox(key=np.array(key, np.uint64), counter=first // _WORDS_PER_BLOCK)
    return philox.random_raw(num_words)


def permutation(key: tuple[int, int], num: int) -> np.ndarray:
    """The random permutation of 0 … num − 1 that belongs to `key`, int64 `[num]`."""
    return np.argsort(random_bits(key, 0, num), kind="stable")


def uniforms(key: tuple[int, int], first: int, shape: tuple[int, int]) -> np.ndarray:
    """Uniform numbers in [0, 1), float64 `shape`: rows of an endless table, from `first` on.

    Args:
        key: the key of the table.
        first: the first row.
        shape: the numbers of rows and columns; the columns a multiple of 4.
    """
    num_rows, num_columns = shape
    bits = random_bits(key, first * num_columns, num_rows * num_columns)
    return (bits >> np.uint64(11)).reshape(shape) * 2.0**-53
