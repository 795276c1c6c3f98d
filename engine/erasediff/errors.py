"""The one exception that means: the user can mend this."""


class UserError(Exception):
    """A mistake in what the user gave, told in one sentence that says what to do.

    The command line prints the sentence without a traceback and exits with code 2. Code that finds a programming
    error raises ``ValueError`` or ``TypeError`` instead.
    """
