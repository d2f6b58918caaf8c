"""How bad input is refused."""


def require(condition: bool, flag: str, got: object, allowed: str) -> None:
    """Raise a ValueError that names the flag, what it got and what is allowed."""
    if not condition:
        raise ValueError(f"{flag} must be {allowed}, got {got!r}")
