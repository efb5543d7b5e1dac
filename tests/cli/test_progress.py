"""What a long run says where there is no terminal."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from longroll.cli import _progress
from longroll.cli._progress import EVERY, FIRST, Lines
from longroll.errors import LongrollError
from longroll.training import PosttrainOptions


class Run:
    """Steps that take their time, and the lines on them."""

    def __init__(self, monkeypatch, total: int) -> None:
        self.now, self.total, self.said = 0.0, total, []
        monkeypatch.setattr(_progress.console, "print", lambda line, **_: self.said.append((self.now, line)))
        self.lines = Lines("training", clock=lambda: self.now)

    def step(self, done: int, seconds: float) -> None:
        self.now += seconds
        self.lines.update(done, self.total, f"loss {done}.5, 10 tokens/s")


@given(seconds=st.floats(0.01, 100), steps=st.integers(2, 400))
def test_lines_come_every_so_often_and_say_all(seconds, steps):
    with pytest.MonkeyPatch.context() as monkeypatch:
        run = Run(monkeypatch, steps)
        for done in range(1, steps + 1):
            run.step(done, seconds)
        times = [at for at, _ in run.said]
        assert (run.now < FIRST) == (not times)
        assert not times or times[0] <= FIRST + seconds
        for before, after in itertools.pairwise([*times, run.now]):
            gap = max(EVERY, before / 20)
            assert after == run.now or gap <= after - before + 1e-6
            assert after - before <= gap + seconds + 1e-6
        for at, line in run.said:
            done = round(at / seconds)
            assert line.startswith(f"training: {done:,} of {steps:,}, loss {done}.5, 10 tokens/s")
            left = round((steps - done) * (at - seconds) / (done - 1)) if done > 1 else 0
            if done > 1:
                assert line.endswith(f", {left // 3600}:{left // 60 % 60:02}:{left % 60:02} left")


def test_a_resumed_run_judges_its_speed_by_its_own_steps(monkeypatch):
    run = Run(monkeypatch, 1000)
    for done in range(900, 1001):
        run.step(done, 1.0)
    assert "0:01:36 left" in run.said[0][1]


@pytest.mark.parametrize("name", ["wandb", "mlflow", "tensorboard"])
def test_a_logger_that_is_not_installed_is_one_line(name, monkeypatch):
    monkeypatch.setattr("longroll.training.options.find_spec", lambda _: None)
    with pytest.raises(LongrollError, match=f"`report_to` {name} .*pip install {name}"):
        PosttrainOptions(length=8, report_to=name)
    assert PosttrainOptions(length=8).report_to == "none"
    with pytest.raises(LongrollError, match="`report_to` paper is not one of none, tensorboard"):
        PosttrainOptions(length=8, report_to="paper")
