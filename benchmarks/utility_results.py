"""Results of the utility benchmarks that are lines of JSON in a file, one a measurement, and are gone on with."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedpt_secure import files
from fedpt_secure.errors import DataError


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The lines of a file; none where there is no file.

    Raises:
        DataError: it is not JSON lines.
    """
    if not path.exists():
        return []
    try:
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except json.JSONDecodeError as error:
        raise DataError(f"{path} is not JSON lines: {error}", hint="another --results file") from None


def append_line(path: Path, line: Mapping[str, Any]) -> None:
    """Add one line; the file is replaced as a whole or not at all."""
    content = path.read_text(encoding="utf-8") if path.exists() else ""
    files.write_text(path, content + json.dumps(line, allow_nan=False) + "\n")


def epsilon_in_json(value: float) -> float | str:
    """An epsilon as JSON can hold it."""
    return "inf" if math.isinf(value) else value
