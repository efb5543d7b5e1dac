import itertools
import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from longroll import LongrollError, diagnose, position_loss, state_statistics
from longroll.measure._position_loss import PositionLoss, log_spaced
from longroll.measure.roll_out import LOGITS, roll_out
from zoo import CONFIGS, RECURRENT, VOCAB, assert_close, assert_same_state, lm_of, tokens

few = settings(max_examples=5, deadline=None, derandomize=True)
every_family = pytest.mark.parametrize("name", CONFIGS)


def direct(lm, ids):
    """Cross-entropy (B, L) from the logits of one full forward."""
    with torch.no_grad():
        logits, _ = lm(ids[:, :-1])
    return F.cross_entropy(logits.transpose(1, 2).double(), ids[:, 1:], reduction="none")


# ---- the loss at every position


@every_family
def test_position_loss_is_the_full_forwards_for_any_chunks_and_stops(name):
    lm = lm_of(name)
    ids = tokens(3, 61)
    expected = direct(lm, ids)

    @few
    @given(st.one_of(st.none(), st.integers(1, 80)), st.sets(st.integers(0, 70), max_size=4))
    def law(chunk_size, stops):
        loss = position_loss(lm, ids, chunk_size=chunk_size, stops=stops)
        assert loss.losses.shape == (3, 60)  # nothing dropped, no position twice
        assert_close(loss.losses.double(), expected, 2e-5)

    law()


def test_every_target_has_its_own_position():
    """A change of one token moves the loss at its position and after it, and nowhere before."""
    lm, ids = lm_of("mamba2"), tokens(2, 41)
    changed = ids.clone()
    changed[:, 21] = (changed[:, 21] + 1) % VOCAB
    before, after = (position_loss(lm, x, chunk_size=7).losses for x in (ids, changed))
    assert torch.equal(before[:, :20], after[:, :20])
    assert (before[:, 20] != after[:, 20]).all()  # the target x_21 belongs to position 20
    assert (before[:, 21:] != after[:, 21:]).any(dim=1).all()


def test_sliced_logits_give_the_same_loss(monkeypatch):
    lm, ids = lm_of("mamba2"), tokens(3, 61)
    whole = position_loss(lm, ids).losses
    monkeypatch.setitem(LOGITS, "cpu", 4 * 3 * VOCAB)  # 4 positions at a time
    assert_close(position_loss(lm, ids).losses, whole, 1e-6)


def test_mean_low_and_high():
    losses = torch.randn(12, 3000, generator=torch.Generator().manual_seed(0)).abs()
    loss = PositionLoss(losses)
    assert loss.mean.shape == loss.low.shape == loss.high.shape == (3000,)
    torch.testing.assert_close(loss.mean, losses.double().mean(0))
    assert (loss.low < loss.mean).all() and (loss.mean < loss.high).all()
    # the normal interval is near the bootstrap's for a mean of 12
    width = 2 * 1.96 * losses.double().std(0) / 12**0.5
    assert ((loss.high - loss.low) / width).mean().item() == pytest.approx(1.0, abs=0.1)
    assert loss.between(10, 20) == pytest.approx(losses[:, 10:20].mean().item(), rel=1e-6)


def test_one_sequence_has_no_width():
    loss = PositionLoss(torch.rand(1, 40))
    torch.testing.assert_close(loss.low, loss.mean)
    torch.testing.assert_close(loss.high, loss.mean)


def test_an_infinite_loss_stays_at_its_position():
    losses = torch.ones(4, 10)
    losses[0, 6] = float("nan")
    loss = PositionLoss(losses)
    assert torch.isfinite(loss.mean[:6]).all() and torch.isfinite(loss.mean[7:]).all()
    assert torch.isnan(loss.mean[6])
    assert torch.isfinite(loss.low[:6]).all() and torch.isfinite(loss.high[7:]).all()


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.integers(1, 5000), st.integers(1, 8))
def test_curve_bins_partition_the_positions(length, per_octave):
    losses = torch.rand(2, length)
    curve = PositionLoss(losses).curve(per_octave)
    bins = list(zip(curve["start"], curve["stop"], strict=True))
    assert bins[0][0] == 0 and bins[-1][1] == length
    assert all(a < b for a, b in bins)
    assert all(left[1] == right[0] for left, right in itertools.pairwise(bins))
    assert len({len(values) for values in curve.values()}) == 1
    weighted = sum((b - a) * mean for (a, b), mean in zip(bins, curve["loss"], strict=True))
    assert weighted / length == pytest.approx(losses.double().mean().item(), rel=1e-6)
    for (a, b), position in zip(bins, curve["position"], strict=True):
        assert a + 1 <= position + 1e-9 and position <= b + 1e-9


@given(st.integers(1, 10**6), st.integers(1, 8))
@settings(deadline=None, derandomize=True)
def test_log_spaced_positions(length, per_octave):
    positions = log_spaced(length, per_octave)
    assert positions == sorted(set(positions)) and positions[0] == 1 and positions[-1] == length
    assert {2**k for k in range(20) if 2**k <= length} <= set(positions)


def test_watch_and_progress_see_every_stop():
    lm, ids = lm_of("mamba2"), tokens(2, 31)
    seen, done = {}, []
    position_loss(lm, ids, chunk_size=8, stops=[1, 8, 13], watch=seen.__setitem__, progress=done.append)
    assert list(seen) == done == [1, 8, 13, 16, 24, 30]
    with torch.no_grad():
        for position, state in seen.items():
            assert_same_state(state, lm(ids[:, :position])[1], 2e-5)


def test_roll_out_starts_from_a_state():
    lm, ids = lm_of("mamba"), tokens(2, 30)
    whole = torch.cat([chunk.hidden for chunk in roll_out(lm, ids, chunk_size=11)], dim=1)
    *_, last = roll_out(lm, ids[:, :13])
    rest = list(roll_out(lm, ids[:, 13:], chunk_size=5, state=last.state))
    assert_close(torch.cat([chunk.hidden for chunk in rest], dim=1), whole[:, 13:], 2e-5)
    assert [chunk.start for chunk in rest] == [0, 5, 10, 15]
    assert not last.hidden.requires_grad


def test_what_cannot_be_measured():
    lm = lm_of("mamba2")
    with pytest.raises(LongrollError, match=r"\(2, 1\)"):
        position_loss(lm, tokens(2, 1))
    with pytest.raises(LongrollError, match=r"\(9,\)"):
        position_loss(lm, tokens(1, 9)[0])
    with pytest.raises(LongrollError, match=str(VOCAB)):
        position_loss(lm, tokens(2, 9) + VOCAB)
    with pytest.raises(LongrollError, match="`chunk_size` 0"):
        position_loss(lm, tokens(2, 9), chunk_size=0)


# ---- statistics of the state


@pytest.mark.parametrize("name", RECURRENT)
def test_state_statistics_are_the_direct_ones(name):
    lm, ids = lm_of(name), tokens(4, 33)
    positions = [1, 7, 33]
    statistics = state_statistics(lm, ids, [33, 7, 1, 7])
    assert statistics.positions == positions
    assert statistics.layer_indices == [layer.layer for layer in lm.layers]
    for i, position in enumerate(positions):
        with torch.no_grad():
            _, state = lm(ids[:, :position])
        recurrent = [state[key].double().numpy() for key in sorted(state) if key.part == "recurrent"]
        for layer, tensor in enumerate(recurrent):
            for head in {0, tensor.shape[1] - 1}:
                numbers = tensor[:, head].reshape(4, -1)
                expected = {
                    "mean": numbers.mean(),
                    "std": numbers.std(),
                    "norm": np.linalg.norm(numbers, axis=1).mean(),
                    "max": np.abs(numbers).max(),
                }
                for what, value in expected.items():
                    found = statistics.layers[layer][what][i, head].item()
                    assert found == pytest.approx(value, rel=1e-4, abs=1e-7), (what, position, layer, head)
            row = statistics.to_json()["layers"][layer]
            assert row["std"][i] == pytest.approx(tensor.std(), rel=1e-4)
            assert row["max"][i] == pytest.approx(np.abs(tensor).max(), rel=1e-4)
            assert row["heads"] == tensor.shape[1]


def test_statistics_of_what_is_not_there():
    with pytest.raises(LongrollError, match="no recurrent state"):
        state_statistics(lm_of("llama"), tokens(2, 9), [4])
    for positions in ([], [0], [10]):
        with pytest.raises(LongrollError, match=r"1\.\.9"):
            state_statistics(lm_of("mamba2"), tokens(2, 9), positions)


# ---- diagnosis


@pytest.fixture(scope="module")
def forgetful():
    """A Mamba-2 whose state and conv tail hardly matter past a few tokens: it cannot break."""
    lm = lm_of("mamba2")
    with torch.no_grad():
        for layer in lm.model.backbone.layers:
            layer.mixer.A_log.fill_(6.0)
            layer.mixer.dt_bias.fill_(3.0)
    return lm


@pytest.mark.parametrize("chunk_size", [None, 50])
def test_a_model_whose_state_does_not_matter_is_healthy(forgetful, chunk_size):
    done = []
    ids = tokens(6, 513)
    found = diagnose(
        forgetful, ids, train_length=32, chunk_size=chunk_size, progress=lambda *told: done.append(told)
    )
    assert (found.verdict, found.edge) == ("healthy", None)
    assert abs(found.severity) < 1e-3
    ends = {stage: (count, total) for stage, count, total in done}
    assert ends.keys() == {"reading on", "forgetting the past", "restarting", "comparing states"}
    assert ends["reading on"] == ends["forgetting the past"] == (512, 512)
    assert all(count == total for count, total in ends.values())
    data = json.loads(json.dumps(found.to_json(), allow_nan=False))
    assert data["verdict"] == "healthy" and data["max_position"] == 512 and data["train_length"] == 32
    assert data["levels"].keys() == {"in_range", "2x", "8x", "64x", "far"}
    assert data["levels"]["64x"] is None
    expected = direct(forgetful, ids)
    assert data["levels"]["in_range"] == pytest.approx(expected[:, :32].mean().item(), rel=1e-4)
    assert data["levels"]["2x"] == pytest.approx(expected[:, 32:64].mean().item(), rel=1e-4)
    assert data["levels"]["far"] == pytest.approx(expected[:, 256:].mean().item(), rel=1e-4)
    assert [layer["layer"] for layer in data["states"]["layers"]] == [0, 1]


class Breaking:
    """Scales the hidden states past an edge, as a state that has grown too large would."""

    def __init__(self, lm, edge, size):
        self.lm, self.edge, self.size = lm, edge, size

    def __getattr__(self, name):
        return getattr(self.lm, name)

    def __call__(self, input_ids, state=None, *, logits=True):
        start = 0 if state is None else state.seen
        hidden, state = self.lm(input_ids, state, logits=False)
        broken = torch.arange(start, start + input_ids.shape[1]) >= self.edge
        return torch.where(broken[None, :, None], hidden * self.size, hidden), state


@pytest.mark.parametrize(("size", "verdict"), [(1.8, "fades"), (4.0, "explodes"), (float("nan"), "explodes")])
def test_a_planted_break_is_found_where_it_is(forgetful, size, verdict):
    found = diagnose(Breaking(forgetful, 150, size), tokens(24, 513), train_length=32)
    assert found.verdict == verdict
    assert 100 <= found.edge <= 200
    data = json.loads(json.dumps(found.to_json(), allow_nan=False))  # NaN became null
    assert data["verdict"] == verdict
    assert "Breaks at" in found.sentence


def test_diagnose_of_the_control():
    found = diagnose(lm_of("llama"), tokens(4, 65), train_length=16)
    assert found.to_json()["states"] is None


def test_what_cannot_be_diagnosed(forgetful):
    with pytest.raises(LongrollError, match="`train_length`"):
        diagnose(forgetful, tokens(4, 65))
    with pytest.raises(LongrollError, match=r"64 positions.*`tokens.shape\[1\]`"):
        diagnose(forgetful, tokens(4, 65), train_length=64)
    with pytest.raises(LongrollError, match=r"3 sequences.*`tokens.shape\[0\]`"):
        diagnose(forgetful, tokens(3, 65), train_length=16)


@pytest.mark.parametrize("name", ["mamba2", "bamba", "rwkv"])
def test_padded_and_packed_rows_give_the_losses_of_their_documents(name):
    lm = lm_of(name)
    ids = tokens(2, 20)
    mask, starts = torch.ones_like(ids), torch.zeros_like(ids)
    mask[0, :6] = 0
    starts[1, [0, 7, 19]] = 1
    found = position_loss(lm, ids, attention_mask=mask, starts=starts, chunk_size=4)
    for row, start, stop in ((0, 6, 20), (1, 0, 7), (1, 7, 19)):
        expected = position_loss(lm, ids[row : row + 1, start:stop]).losses[0]
        assert torch.allclose(found.losses[row, start : stop - 1], expected, atol=1e-5)
    counted = torch.ones(2, 19, dtype=torch.bool)
    counted[0, :6] = counted[1, [6, 18]] = False
    assert torch.equal(found.counted, counted)
    assert found.mean[3].item() == pytest.approx(found.losses[1, 3].item())  # the other row is padding there
    assert found.between(0, 7) == pytest.approx(
        torch.cat([found.losses[0, 6:7], found.losses[1, :6]]).mean().item()
    )
    assert torch.isnan(found.mean).tolist() == [False] * 18 + [False]
    assert np.isfinite(found.curve()["loss"]).all() and np.isfinite(found.low).all()


def test_a_watch_wants_rows_of_one_document():
    ids = tokens(2, 20)
    with pytest.raises(LongrollError, match="`watch`"):
        position_loss(lm_of("mamba2"), ids, starts=ids == ids[0, 3], watch=lambda *_: None)
