"""How bad input is refused."""

import json
from pathlib import Path


def is_count(text: str) -> bool:
    """Whether it is a number of at most nine digits; other scripts have digits that are none to `int`."""
    return text.isascii() and text.isdigit() and len(text) <= 9


def require(condition: bool, flag: str, got: object, allowed: str) -> None:
    """Raise a ValueError that names the flag, what it got and what is allowed."""
    if not condition:
        raise ValueError(f"{flag} must be {allowed}, got {got!r}")


def read_object(path: Path, flag: str) -> dict:
    """The JSON object in a file; a ValueError names flag and file where it holds none."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{flag} {path.parent}: {path.name} must be a JSON object: {error}") from None
    if not isinstance(found, dict):
        raise ValueError(f"{flag} {path.parent}: {path.name} must be a JSON object, got a {type(found).__name__}")
    return found
