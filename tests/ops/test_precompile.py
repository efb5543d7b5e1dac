"""A dry run leaves nothing behind: not in a checkpoint, not in Triton, not in other threads."""

import threading
import time

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from longroll.ops._precompile import _forward_and_backward, precompile


class Square(torch.autograd.Function):
    """Twice an output, and None between."""

    gradients: list = []  # noqa: RUF012 (of all calls)

    @staticmethod
    def forward(ctx, x, final):
        ctx.save_for_backward(x)
        return x * x, None, x + 0 if final else None

    @staticmethod
    def backward(ctx, dy, _, dfinal):
        Square.gradients.append((dy, dfinal))
        (x,) = ctx.saved_tensors
        return 2 * x * dy + (0 if dfinal is None else dfinal), None


def square(x, final):
    return Square.apply(x, final)


@pytest.mark.parametrize("final", [True, False])
def test_backward_is_precompiled_with_a_gradient_for_each_output(final):
    Square.gradients.clear()
    x = torch.randn(3, requires_grad=True)
    _forward_and_backward(square, {"x": x, "final": final})
    ((dy, dfinal),) = Square.gradients
    assert dy.shape == x.shape and (dfinal is not None) == final and x.grad is None
    with torch.no_grad():
        _forward_and_backward(square, {"x": x, "final": final})
    assert len(Square.gradients) == 1


def test_a_checkpointed_block_may_precompile_the_first_time():
    x, calls = torch.randn(3, requires_grad=True), []

    def block(x):
        if not calls:
            _forward_and_backward(square, {"x": x, "final": True})
        calls.append(1)
        return square(x.sin(), True)[0]

    checkpoint(block, x, use_reentrant=False).sum().backward()
    torch.testing.assert_close(x.grad, 2 * x.detach().sin() * x.detach().cos())
    assert len(calls) == 2


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_what_a_dry_run_set_is_gone_however_it_ends(error):
    pytest.importorskip("triton")
    from triton.runtime._async_compile import active_mode
    from triton.runtime.jit import JITFunction

    run, seen = JITFunction.run, []

    def fails():
        seen.append((active_mode.get() is not None, JITFunction.run is run))
        raise error

    if error is KeyboardInterrupt:
        with pytest.raises(KeyboardInterrupt):
            precompile(fails, {})
    else:
        precompile(fails, {})
    assert seen == [(True, False)]
    assert active_mode.get() is None and JITFunction.run is run


def test_a_dry_run_compiles_and_other_threads_launch(monkeypatch):
    pytest.importorskip("triton")
    from triton.runtime.jit import JITFunction

    warm: dict[str, bool] = {}
    monkeypatch.setattr(JITFunction, "run", lambda self, *, grid, warmup: warm.update({self: warmup}))

    def launch(who):
        JITFunction.run(who, grid=(1,), warmup=False)

    def call():
        other = threading.Thread(target=launch, args=("other thread",))
        other.start()
        other.join()
        launch("dry run")
        return (torch.zeros(()),)

    precompile(call, {})
    launch("after")
    assert warm == {"other thread": False, "dry run": True, "after": False}


def test_two_dry_runs_at_a_time_both_only_compile(monkeypatch):
    pytest.importorskip("triton")
    from triton.runtime.jit import JITFunction

    warm = []

    def run(self, *, grid, warmup):
        warm.append(warmup)

    monkeypatch.setattr(JITFunction, "run", run)

    def call(seconds):
        for _ in range(3):
            time.sleep(seconds)
            JITFunction.run(None, grid=(1,), warmup=False)
        return (torch.zeros(()),)

    threads = [threading.Thread(target=precompile, args=(call, {"seconds": s})) for s in (0.01, 0.03)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert warm == [True] * 6 and JITFunction.run is run
