"""Reads the JSON files and metrics of a run's folder."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from diffjax.errors import UserError

_NON_FINITE = ("nan", "inf", "-inf")


def read_json(path: Path) -> dict[str, Any] | None:
    """Reads a JSON object from a file; returns None if the file does not exist.

    Raises:
        UserError: the file does not contain a JSON object, or can't be read.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except OSError as error:
        raise UserError(f"{path} can't be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"{path} is not valid JSON ({error}): restore it, or move it away and make it again"
        ) from error
    if not isinstance(content, dict):
        raise UserError(f"{path} does not contain a JSON object: restore it, or move it away")
    return content


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """Reads the records of a `metrics.jsonl` in the order in which they were written.

    The strings "nan", "inf" and "-inf", which JSON has no numbers for, are returned as floats. An
    incomplete last line, left by a killed process, is ignored.

    Args:
        path: the file, or the run's folder. If the file does not exist, the result is empty.

    Raises:
        UserError: a line other than the last is not a JSON object with a `step`.
    """
    path = Path(path)
    if path.is_dir():
        path /= "metrics.jsonl"
    if not path.exists():
        return []
    lines = path.read_bytes().splitlines()
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
            record["step"] = int(record["step"])
        except (ValueError, TypeError, KeyError, OverflowError, RecursionError) as error:
            if number == len(lines):
                break
            raise UserError(
                f"{path}, line {number}, is not a record of metrics: correct or delete that line"
            ) from error
        records.append({key: _number(value) for key, value in record.items()})
    return records


def metrics_arrays(records: Sequence[Mapping[str, Any]]) -> dict[str, np.ndarray]:
    """Converts records to arrays by name, each `[records]`; missing numbers become NaN.

    Example:
        >>> arrays = metrics_arrays([{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.5, "lr": 0.1}])
        >>> arrays["step"].tolist(), arrays["loss"].tolist(), arrays["lr"].tolist()
        ([1, 2], [2.0, 1.5], [nan, 0.1])
    """
    names = dict.fromkeys(name for record in records for name in record)
    return {
        name: np.array([record.get(name, np.nan) for record in records])
        for name in ("step", *names)
    }


def _number(value: Any) -> Any:
    return float(value) if value in _NON_FINITE else value
