"""The one exception for a user's mistake: every command prints its text and exits with status 1, without a traceback."""


class UserError(Exception):
    """What was wrong, which file or key, and what is allowed."""


def shortened(text: str, longest: int) -> str:
    """The text as one message can show it: as it is, or its beginning and how long it is."""
    return text if len(text) <= longest else f"{text[: longest - 30]}… ({len(text):,} characters)"
