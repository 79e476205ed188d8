"""Conditions in files: texts, one for each sample, arrays, or what text encoders returned."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from diffjax.conditions import Condition, Several, TokenStates
from diffjax.data.archives import read_npz
from diffjax.errors import UserError
from diffjax.pretrained.files import read_state_dict


def read(condition: Condition, given: Sequence[str]) -> Any:
    """The condition of a command-line flag: texts to parse, or `@FILE`.

    A file has a text in each line, for prompts with commas, or is an `.npz` of arrays with the
    names in `condition.arrays`, one row for each sample, such as a file of samples.

    Args:
        condition: the kind of condition.
        given: the texts, or a single one that begins with `@`.

    Raises:
        UserError: there is no such file, or it has no such condition.

    Example:
        >>> from diffjax.conditions import Classes
        >>> read(Classes(3), ["0", "2"]).tolist()
        [0, 2]
    """
    if not given:
        raise UserError("an empty list describes no sample: give one entry for each")
    if not given[0].startswith("@"):
        return condition.parse(given)
    if len(given) > 1:
        raise UserError(f"{given[0]} is a file with all conditions: pass it alone")
    path = Path(given[0][1:])
    if path.suffix == ".npz":
        return condition.of(_arrays(condition, path))
    return condition.parse(texts_in(path))


def texts_in(path: Path) -> list[str]:
    """The texts in a file, one in each line that is not empty.

    Raises:
        UserError: it can't be read, is not UTF-8, or has no text.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, ValueError) as error:
        raise UserError(f"can't read conditions from {path}: {error}") from error
    lines = [line for line in lines if line.strip()]
    if not lines:
        raise UserError(f"{path} is empty: it has a text for each sample")
    return lines


def read_states(condition: Condition, file: str) -> tuple[Any, Any]:
    """The condition of token states in a file, and the negative condition, or None without.

    Its tensors are what `encode_prompt` of a pipeline of diffusers returns, under the names that
    the pipeline takes them by: `prompt_embeds` `[n, length, width]`, `pooled_prompt_embeds`
    `[n, width]` where a network has pooled vectors, and `negative_prompt_embeds` and
    `negative_pooled_prompt_embeds` for guidance.

    Args:
        condition: token states, or parts of which `text` is that.
        file: the file of safetensors or torch.

    Raises:
        UserError: it can't be read, lacks a tensor, or has states of another shape.
    """
    tensors = read_state_dict(file)

    def states(begin: str, kind: Condition) -> Any:
        names = f"{begin}prompt_embeds", f"{begin}pooled_prompt_embeds"
        if names[0] not in tensors:
            return None
        found = np.asarray(tensors[names[0]], np.float32)
        pooled = np.asarray(tensors[names[1]], np.float32) if names[1] in tensors else None
        if pooled is None:
            pooled = np.zeros((len(found), 0), np.float32)
        one = TokenStates._make((found, np.ones(found.shape[:2], bool), pooled))
        return kind.of({"text": one} if isinstance(kind, Several) else one)

    found = states("", condition)
    if found is None:
        raise UserError(f"{file} has no prompt_embeds, but {', '.join(tensors) or 'nothing'}")
    return found, states("negative_", condition.negative)


def _arrays(condition: Condition, path: Path) -> Any:
    abstract = condition.abstract(1)
    names = list(condition.arrays(abstract))
    file = read_npz(path, str(path))
    if any(name not in file for name in names):
        raise UserError(
            f"{path} has {', '.join(file) or 'nothing'}; a condition of {condition.describe()} "
            f"has the arrays {', '.join(names)}"
        )
    return jax.tree.structure(abstract).unflatten([file[name] for name in names])
