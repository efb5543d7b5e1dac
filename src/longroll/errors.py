"""The one exception a user sees: what is wrong, and the mend."""


class LongrollError(Exception):
    """A problem in what longroll was given. The message names the flag or file and says how to mend it."""
