"""The exception that a user sees: what is wrong, and what to do."""


class LongrollError(Exception):
    """A problem in what longroll was given. The message names the argument or file and says what to do.

    Arguments stand in backticks under their Python names; the command line writes its flags in their place
    (`longroll.cli._flags`).
    """

    told = False
    """Whether another process has said it."""

    def __str__(self) -> str:
        """Return the message in one line, also where it quotes another library's lines."""
        return " ".join(line.strip() for line in super().__str__().splitlines() if line.strip())


_NO_MEMORY = ("can't allocate memory", "CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED")


def out_of_memory(error: BaseException) -> bool:
    """Return whether an exception says that a device or the machine has too little memory."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":  # torch's, as cuda's
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in _NO_MEMORY)


def first_line(error: BaseException) -> str:
    """Return what an exception of another library says, short enough to stand inside one line of an error."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]


def named(error: BaseException) -> str:
    """Return what an exception of the user's own code says, with its class, in one line."""
    return " ".join(f"{type(error).__name__}: {error}".split())
