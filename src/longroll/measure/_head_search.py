"""Search thousands of heads for the few that do the damage, by adaptive group testing.

A trial holds a whole group of heads in their training range and tells whether the group carries the damage.
Heads stand in the order in which they have left their range, the farthest out first. Bisection finds the
shortest beginning of the list that carries the damage, to within a factor of two. That beginning is then cut
at its front and at its end, by halves first and by less where no half can be spared. The number of trials
grows with the logarithm of the number of heads. Source: Du and Hwang 2000, "Combinatorial group testing and
its applications", chapter 2 (binary splitting).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

H = TypeVar("H")


def smallest_group(heads: Sequence[H], carries: Callable[[list[H]], bool], trials: int) -> list[H] | None:
    """Return a small stretch of `heads` that carries the damage; None where `heads` as a whole do not.

    Args:
        heads: the likeliest first, at least one.
        carries: makes a trial of a group: whether the group carries the damage.
        trials: how many may be made, at least 1; fewer than 5 log2(len(heads)) may leave a larger group.
    """
    left = trials

    def try_group(start: int, stop: int) -> bool:
        nonlocal left
        left -= 1
        return carries(list(heads[start:stop]))

    if not try_group(0, len(heads)):
        return None
    below, stop = 0, len(heads)  # the beginning of length `stop` carries the damage, that of `below` does not
    while left and stop > max(1, 2 * below):
        middle = max(1, round((max(below, 1) * stop) ** 0.5) if stop > 2 else 1)
        if try_group(0, middle):
            stop = middle
        else:
            below = middle
    start, step = 0, below or stop // 2
    while left and step:
        if try_group(start + step, stop):
            start += step
        elif left and try_group(start, stop - step):
            stop -= step
        else:
            step //= 2
        step = min(step, (stop - start) // 2)
    return list(heads[start:stop])
