"""The one exception that the commands turn into a message instead of a traceback."""


class UserError(ValueError):
    """Something the user can mend. The message names the file or argument, what it was and what it must be."""
