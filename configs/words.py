"""Numbers in messages."""


def counted(count: int, noun: str) -> str:
    """A number with its noun, as 1 file, 2,000 files."""
    return f"{count:,} {noun}{'s' * (count != 1)}"
