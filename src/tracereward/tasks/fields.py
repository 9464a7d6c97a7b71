"""Fields of raw rows."""


def read_text(row: dict, field: str) -> str:
    """Required text field of a row, stripped.

    Raises:
        KeyError: it is missing.
        ValueError: it is empty or not text.
    """
    value = row[field]
    if not isinstance(value, str):
        raise ValueError(f"field {field!r} is {type(value).__name__}, not text")
    if not value.strip():
        raise ValueError(f"field {field!r} is empty")
    return value.strip()


def optional_text(row: dict, field: str) -> str | None:
    """Optional text field of a row, stripped; None if it is missing, null or blank."""
    value = row.get(field)
    if value is None or (isinstance(value, str) and not value.strip()):
        return None
    return read_text(row, field)


def folded(text: str) -> str:
    """Case-folded text with single spaces and no final full stop."""
    return " ".join(text.split()).rstrip(".").casefold()
