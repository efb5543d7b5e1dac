"""`longroll` whose rank WHICH fails HOW at the end of its reading: `failing.py HOW WHICH COMMAND`."""

import os
import signal
import sys
import time

from longroll import cli, ranks
from longroll.errors import LongrollError
from longroll.measure import _position_loss

how, which = sys.argv[1], int(sys.argv[2])
read = _position_loss._read


def failing(*arguments):
    losses = read(*arguments)
    if ranks.rank() != which:
        return losses
    time.sleep(2)  # until the others wait
    if how == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    raise LongrollError("the moon is full.") if how == "error" else ValueError("a fault of the code")


_position_loss._read = failing
del sys.argv[1:3]
cli.main()
