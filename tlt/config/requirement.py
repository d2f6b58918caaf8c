"""How bad input is refused."""


def is_count(text: str) -> bool:
    """Whether it is a number of at most nine digits; other scripts have digits that are none to `int`."""
    return text.isascii() and text.isdigit() and len(text) <= 9


def require(condition: bool, flag: str, got: object, allowed: str) -> None:
    """Raise a ValueError that names the flag, what it got and what is allowed."""
    if not condition:
        raise ValueError(f"{flag} must be {allowed}, got {got!r}")
