"""The one exception that a user is meant to read."""


class InputError(ValueError):
    """Something that we were given can't be used: a file, a field, a switch, a prompt.

    The message is one sentence that says what is wrong, where, and what to do about it. The commands print it without
    a traceback and exit with status 2; anything else that escapes is a bug of ours.
    """
