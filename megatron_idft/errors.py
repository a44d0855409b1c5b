"""The base of every error that its reader can mend."""

import os

VERBOSE = "MEGATRON_IDFT_VERBOSE"


def verbose() -> bool:
    """Whether tracebacks and all that Megatron prints of its arguments are wanted on the console."""
    return os.environ.get(VERBOSE, "0") not in ("", "0")


class UserError(Exception):
    """Input, flags or an installation that cannot be used. The message names the remedy; the programs show it alone."""

    exit_code = 2


class InputError(UserError, ValueError):
    """A file or setting that cannot be used as it is."""


class ArgumentError(UserError, ValueError):
    """Flags that cannot be used, or not together."""
