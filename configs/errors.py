"""The one exception for a user's mistake: every command prints its text and exits with status 1, without a traceback."""


class UserError(Exception):
    """What was wrong, which file or key, and what is allowed."""
