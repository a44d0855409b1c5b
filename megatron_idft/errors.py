"""The base of every error that its reader can mend."""


class UserError(Exception):
    """Input, flags or an installation that cannot be used. The message names the remedy; the programs show it alone."""

    exit_code = 2


class InputError(UserError, ValueError):
    """A file or setting that cannot be used as it is."""
