"""Writes docs/networks.md: parameters and operations of every published size, beside the papers'.

python -m tests.pages.networks          # sizes that are new or have changed
python -m tests.pages.networks --all    # and the operations of all others again
"""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from diffjax.models.families import LAYOUTS
from diffjax.pretrained.family import Family
from diffjax.training.flops import matrix_flops

PAGE = Path(__file__).parents[2] / "docs" / "networks.md"
AUTOENCODED = jax.ShapeDtypeStruct((1, 256, 256, 3), jnp.float32)

# Millions of parameters, and billions of multiply-adds of one evaluation. From memory, but for the
# parameters of EDM2 and DDT.
PAPERS: dict[str, tuple[str, str]] = {
    # Peebles & Xie 2022, table 4.
    "DiT-S/8": ("33", "0.36"),
    "DiT-S/4": ("33", "1.41"),
    "DiT-S/2": ("33", "6.06"),
    "DiT-B/8": ("131", "1.42"),
    "DiT-B/4": ("130", "5.56"),
    "DiT-B/2": ("130", "23.01"),
    "DiT-L/8": ("459", "5.01"),
    "DiT-L/4": ("458", "19.70"),
    "DiT-L/2": ("458", "80.71"),
    "DiT-XL/8": ("676", "7.39"),
    "DiT-XL/4": ("675", "29.05"),
    "DiT-XL/2": ("675", "118.64"),
    # Ma et al. 2024, table 1.
    "SiT-S/2": ("33", ""),
    "SiT-B/2": ("130", ""),
    "SiT-L/2": ("458", ""),
    "SiT-XL/2": ("675", ""),
    # The README of MCG-NJU/DDT.
    "DDT-XL/2": ("675", ""),
    # Bao et al. 2022, table 1.
    "U-ViT-S/2": ("44", ""),
    "U-ViT-S-deep/2": ("58", ""),
    "U-ViT-M/4": ("131", ""),
    "U-ViT-L/2": ("287", ""),
    "U-ViT-L/4": ("287", ""),
    "U-ViT-H/2": ("501", ""),
    "U-ViT-H/4": ("501", ""),
    # Dhariwal & Nichol 2021, table 4 and section 3.
    "ADM-64": ("296", ""),
    "ADM-128": ("422", ""),
    "ADM-256": ("554", "1120"),
    "ADM-512": ("559", "1983"),
    # Karras et al. 2024, table 2.
    "EDM2-XS": ("125", "46"),
    "EDM2-S": ("280", "102"),
    "EDM2-M": ("498", "181"),
    "EDM2-L": ("777", "282"),
    "EDM2-XL": ("1119", "406"),
    "EDM2-XXL": ("1523", "552"),
}

HEAD = """# Sizes of published networks

Parameters of every published size, and operations of one evaluation for one image, beside the
figures of the papers. `python -m tests.pages.networks` writes this page, and
a test compares it with the networks.

Parameters are in millions. Constants that a network stores are among them. Operations are
billions of multiply-adds in matrix products and convolutions
(`diffjax.training.flops.matrix_flops`, halved), for labels without guidance; the authors of EDM2
count element-wise operations too, and those of ADM's figures are of Peebles & Xie 2022. Of an
autoencoder they are for encoding and decoding an image of 256x256, of a text encoder for as many
tokens as it reads, or 512.

The papers' figures, except the parameters of EDM2 and DDT, were entered from memory and have not
been compared with the papers: look one up before you cite it. A cell without a number has not
been looked up, or the paper prints none.

| size | input | parameters | the paper's | operations | the paper's |
|---|---|---|---|---|---|
"""


class Row(NamedTuple):
    """A line of the table."""

    name: str
    family: Family


def rows() -> Iterator[Row]:
    """Every published size; further layouts of a network are left out."""
    for layouts in LAYOUTS.values():
        family = next(iter(layouts.values()))
        for name in family.sizes:
            yield Row(name, family)


def start_of(row: Row) -> str:
    """The cells of a line that need no evaluation: name, input and parameters."""
    network = row.family.size(row.name)
    first = _inputs(row.family, network)[0]
    of_text = jnp.issubdtype(first.dtype, jnp.integer)
    size = f"{first.shape[1]} tokens" if of_text else "x".join(map(str, first.shape[1:]))
    millions = row.family.sizes[row.name].num_parameters / 1e6
    theirs, _ = PAPERS.get(row.name, ("", ""))
    return f"| `{row.name}` | {size} | {millions:.1f} | {theirs} |"


def _inputs(family: Family, network: Any) -> tuple[jax.ShapeDtypeStruct, ...]:
    """The arguments of a call; autoencoders are shown with larger images than the smallest."""
    inputs = tuple(family.inputs(network))
    of_text = jnp.issubdtype(inputs[0].dtype, jnp.integer)
    return inputs if of_text or hasattr(network, "image_shape") else (AUTOENCODED,)


def line_of(row: Row) -> str:
    """A line of the table."""
    _, theirs = PAPERS.get(row.name, ("", ""))
    return f"{start_of(row)} {_digits(_multiply_adds(row) / 1e9)} | {theirs} |"


def _multiply_adds(row: Row) -> float:
    network: Any = row.family.size(row.name)
    inputs = _inputs(row.family, network)
    module = getattr(network, "network", network)
    if hasattr(module, "attention") and isinstance(module.attention, str):
        module = module.clone(attention="xla")  # made of products that can be counted
    return 0.5 * matrix_flops(
        lambda params, *inputs: module.apply({"params": params}, *inputs),
        row.family.shapes(network),
        *inputs,
    )


def _digits(number: float) -> str:
    return f"{number:.2f}" if number < 10 else f"{number:.1f}" if number < 1000 else f"{number:.0f}"


def main(again: bool) -> None:
    """Writes the page; a line whose size has not changed is kept, unless all are counted again."""
    known = PAGE.read_text("utf-8").splitlines() if PAGE.exists() and not again else []
    lines = []
    for row in rows():
        start = start_of(row)
        kept = (line for line in known if line.startswith(start))
        lines.append(next(kept, None) or line_of(row))
    PAGE.write_text(HEAD + "".join(f"{line}\n" for line in lines), "utf-8")


if __name__ == "__main__":
    main(again="--all" in sys.argv[1:])
