"""Random numbers by place: any part of a stream without the parts before it.

NumPy promises that `random_raw` stays as it is from version to version, which it does not for its
shuffles and distributions; an order of images or a split should not change with an upgrade.
"""

import numpy as np

from diffjax.errors import UserError

_WORDS_PER_BLOCK = 4


def random_bits(key: tuple[int, int], first: int, num_words: int) -> np.ndarray:
    """Words `first` … `first + num_words − 1` of the stream of `key`.

    Args:
        key: two integers of 64 bits; different keys, independent streams.
        first: a multiple of 4, Philox's block.
        num_words: how many.

    Returns:
        uint64 `[num_words]`.

    Raises:
        UserError: a key is negative or has more bits.

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
    """0 … num − 1 in the order that belongs to `key`, int64 `[num]`."""
    return np.argsort(random_bits(key, 0, num), kind="stable")


def uniforms(key: tuple[int, int], first: int, shape: tuple[int, int]) -> np.ndarray:
    """Rows `first` … of an endless table of numbers in [0, 1), float64 `shape`.

    Args:
        key: which table.
        first: the first row.
        shape: rows and columns; the columns a multiple of 4.
    """
    num_rows, num_columns = shape
    bits = random_bits(key, first * num_columns, num_rows * num_columns)
    return (bits >> np.uint64(11)).reshape(shape) * 2.0**-53
