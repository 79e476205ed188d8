"""A network drawn to scale, as an inline SVG."""

from collections.abc import Sequence
from html import escape

from diffjax.evaluation.tables import number, percent
from diffjax.explain.network_parts import Part

_WIDTH, _HEIGHT, _NAMES, _STRIP = 960.0, 170.0, 120.0, 46.0
_LEAST = 1.0  # pixels that a part is drawn with, however small it is
_LABEL = 7.0  # pixels of a letter in the strip
_TOP = 18.0


def draw_network(parts: Sequence[Part], title: str) -> str:
    """An `<svg>` of the parts from left to right, and below it a strip of their weights.

    The height of a part is the side of the square of its places, its width is the numbers at each
    place. The strip is divided in proportion to the weights of the parts.

    Args:
        parts: in the order of their evaluation.
        title: what the drawing shows, for a screen reader.

    Example:
        >>> parts = [Part("conv_in", "Conv", 64, 8.0, 3, 30), Part("out", "Conv", 16, 4.0, 6, 10)]
        >>> svg = draw_network(parts, "two parts")
        >>> svg.count("<rect"), "two parts" in svg
        (4, True)
    """
    height = _TOP + _HEIGHT + _NAMES + 26 + _STRIP
    return (
        f'<svg viewBox="0 0 {_WIDTH:g} {height:g}" role="img" aria-label="{escape(title)}">'
        f"{''.join([*_bars(parts), *_strip(parts, height - _STRIP)])}</svg>"
    )


def bar_widths(parts: Sequence[Part], whole: float) -> list[float]:
    """The widths of the bars, in proportion to the numbers at each place; together `whole`.

    Example:
        >>> parts = [Part("a", "", 1, 1.0, 1, 0), Part("b", "", 1, 1.0, 3, 0)]
        >>> bar_widths(parts, 80.0)
        [20.0, 60.0]
    """
    total = sum(part.width for part in parts)
    return [whole * part.width / total for part in parts]


def _bars(parts: Sequence[Part]) -> list[str]:
    gap = min(14.0, 0.4 * _WIDTH / len(parts))
    drawn, left, most = [], gap / 2, max(part.side for part in parts)
    for part, width in zip(parts, bar_widths(parts, _WIDTH - gap * len(parts)), strict=True):
        tall = max(_HEIGHT * part.side / most, _LEAST)
        top, middle = _TOP + (_HEIGHT - tall) / 2, left + width / 2
        color = "--series-1" if part.places > 1 else "--series-2"
        below = _TOP + _HEIGHT + 10
        drawn.append(
            f'<rect x="{left:.1f}" y="{top:.1f}" width="{max(width, _LEAST):.1f}" '
            f'height="{tall:.1f}" fill="var({color})"/>'
            f'<text transform="translate({middle + 3:.1f} {below:.1f}) rotate(-90)" '
            f'text-anchor="end" font-size="11">{escape(plain(part.name))}</text>'
        )
        left += width + gap
    return drawn


def _strip(parts: Sequence[Part], top: float) -> list[str]:
    total = max(sum(part.num_params for part in parts), 1)
    heading = f"all {number(total)} weights, by the part that they are in"
    drawn = [f'<text x="0" y="{top - 8:.1f}" font-size="12">{heading}</text>']
    left = 0.0
    for part in parts:
        width = _WIDTH * part.num_params / total
        color = "--series-1" if part.places > 1 else "--series-2"
        drawn.append(
            f'<rect x="{left:.1f}" y="{top:.1f}" width="{width:.2f}" height="22" '
            f'fill="var({color})" stroke="var(--page)"/>'
        )
        label = f"{plain(part.name)}, {percent(part.num_params / total)}"
        if _LABEL * len(label) < width:
            drawn.append(
                f'<text x="{left + width / 2:.1f}" y="{top + 37:.1f}" text-anchor="middle" '
                f'font-size="11">{escape(label)}</text>'
            )
        left += width
    return drawn


def plain(name: str) -> str:
    """The name of a part without underscores.

    Example:
        >>> plain("patch_embedding")
        'patch embedding'
    """
    return name.replace("_", " ")
