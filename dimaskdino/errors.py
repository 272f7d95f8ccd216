"""The one kind of error that a person is meant to read instead of a traceback."""


class UserError(Exception):
    """Something outside the program is wrong: a file, a setting, a disk. The message says what to do about it."""
