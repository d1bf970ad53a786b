"""Arguments that several benchmarks share: lists separated by commas."""

from __future__ import annotations

from configs.errors import UserError


def numbers(text: str, name: str) -> list[int]:
    """A comma list of positive whole numbers."""
    values = text.split(",")
    if not all(value.isdecimal() and int(value) > 0 for value in values):
        raise UserError(f"--{name} {text}: positive whole numbers, separated by commas")
    return [int(value) for value in values]


def names(text: str, name: str, known: tuple[str, ...]) -> list[str]:
    values = list(known) if text == "all" else text.split(",")
    unknown = [value for value in values if value not in known]
    if unknown:
        raise UserError(f"--{name} {','.join(unknown)}: known: {', '.join(known)}, all")
    return values
