"""Lines of JSONL files from outside: whatever a line holds, it is an object or an error that names it."""

import json
from collections.abc import Iterator
from pathlib import Path

MAX_LINE_CHARS = 2**22
"""A longer line is rejected without being read into memory as a whole."""


def numbered_lines(path: Path) -> Iterator[tuple[int, str]]:
    """(line number from 1, line) of a text file, blank lines left out; of a line that is too long its beginning, and
    of bytes that are not UTF-8 lone surrogates: `parse_object` rejects both."""
    with path.open(encoding="utf-8", errors="surrogateescape") as file:
        number = 0
        while line := file.readline(MAX_LINE_CHARS + 1):
            number += 1
            rest = line
            while rest and not rest.endswith("\n"):
                rest = file.readline(MAX_LINE_CHARS + 1)
            if line.strip():
                yield number, line


def parse_object(line: str, where: str) -> dict:
    """The JSON object of a line. Raises ValueError that begins with `where`."""
    if len(line) > MAX_LINE_CHARS:
        raise ValueError(f"{where}: longer than {MAX_LINE_CHARS} characters")
    if not is_text(line):
        raise ValueError(f"{where}: not UTF-8")
    try:
        record = json.loads(line)
    except RecursionError:
        raise ValueError(f"{where}: nested too deeply") from None
    except ValueError as error:  # a number of too many digits is one that is no JSONDecodeError
        raise ValueError(f"{where}: not JSON ({error})") from None
    if not isinstance(record, dict):
        raise ValueError(f"{where}: must be a JSON object, got {type(record).__name__}")
    return record


def is_text(value: str) -> bool:
    """Whether it can be encoded: JSON's escapes may spell halves of characters."""
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True
