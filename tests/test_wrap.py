"""`longroll.wrap`: a module of one's own obeys the laws of every family, or is refused by name."""

import re
import typing

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

import longroll
import zoo
from longroll import LongrollError
from longroll.conformance import laws
from longroll.families._state_tree import Leaf
from longroll.state import RecurrentState, StateKey
from own_modules import RNN, VOCAB, WIDTH, Recurrence

MODULES = {
    "dict": lambda: Recurrence("dict"),
    "tuple": lambda: Recurrence("tuple"),
    "stacked": lambda: Recurrence("stacked"),
    "tensor": lambda: Recurrence("tensor"),
    "gru": lambda: RNN(nn.GRU),
    "lstm": lambda: RNN(nn.LSTM),
}
every_module = pytest.mark.parametrize("name", MODULES)


def wrapped(name, dtype=torch.float64, **options):
    torch.manual_seed(0)
    return longroll.wrap(MODULES[name]().to(dtype), vocab_size=VOCAB, **options)


def tokens(rows, length, seed=0):
    return torch.randint(VOCAB, (rows, length), generator=torch.Generator().manual_seed(seed))


# ---- what holds of every family holds of one's own


@every_module
def test_the_laws_of_the_state(name, tmp_path):
    lm = wrapped(name)
    ids, pieces = tokens(3, 24), [7, 1, 15, 1]
    state = laws.random_state(lm, 3)
    found = [
        laws.chunking(lm, ids, pieces, state),
        laws.chaining(lm, tokens(2, 25), pieces),
        laws.zero_state(lm, ids),
        laws.permutation(lm, ids, 9, [2, 0, 1]),
        laws.saving(lm, ids, 9, tmp_path),
        laws.zero_intervention(lm, ids),
    ]
    assert max(gap.size for gap in found) < 1e-12, found
    assert not laws.unreached(lm, ids[:, :2], state)


@every_module
def test_logits_are_the_modules_own(name):
    lm = wrapped(name)
    ids = tokens(2, 9)
    first, state = lm.model.module(ids[:, :4], None)
    expected, _ = lm.model.module(ids[:, 4:], state)
    _, ours = lm(ids[:, :4])
    assert torch.equal(lm(ids[:, 4:], ours)[0], expected)
    assert torch.equal(lm(ids[:, :4])[0], first)
    assert ours.seen == 4


@every_module
def test_padding_and_documents_inside_a_row(name):
    """Each text gives what it gives alone."""
    lm, ids = wrapped(name), tokens(2, 12)
    state = laws.random_state(lm, 2)
    mask, starts = torch.ones(2, 12), torch.zeros(2, 12)
    mask[0, :3] = mask[1, 10:] = 0
    starts[1, 4] = 1
    out, final = lm(ids, state, attention_mask=mask, starts=starts)
    first, first_state = lm(ids[:1, 3:], state.rows([0]))
    second, _ = lm(ids[1:, :4], state.rows([1]))
    third, third_state = lm(ids[1:, 4:10])
    torch.testing.assert_close(out[:1, 3:], first)
    torch.testing.assert_close(out[1:, :10], torch.cat([second, third], dim=1))
    for key in final:
        torch.testing.assert_close(final[key], torch.cat([first_state[key], third_state[key]]))


@pytest.mark.parametrize(
    ("name", "keys"),
    [
        ("dict", ["0.recurrent.0", "1.recurrent.0", "0.conv.0", "1.conv.0"]),
        ("tuple", ["0.recurrent.0", "0.conv.0", "1.recurrent.0", "1.conv.0"]),
        ("tensor", ["0.recurrent.0"]),
        ("gru", ["0.recurrent.0", "1.recurrent.0"]),
        ("lstm", ["0.recurrent.0", "1.recurrent.0", "0.recurrent.1", "1.recurrent.1"]),
    ],
)
def test_the_layout_is_seen_and_shown(name, keys):
    lm = wrapped(name)
    _, state = lm(tokens(5, 3))
    assert sorted(map(str, state)) == sorted(keys)
    assert all(len(t) == 5 for t in state.values())
    recurrent = [key for key in keys if "recurrent" in key]
    assert [f"{layer.layer}.recurrent" for layer in lm.layers] == [key[:-2] for key in recurrent]
    assert all(leaf.path in repr(lm) and leaf.path for leaf in lm.model.tree.leaves)
    assert (", conv, " in repr(lm)) == any("conv" in key for key in keys)


def test_what_is_declared_is_taken():
    lm = wrapped("dict", part={"tails.0": "recurrent", "h.1": "conv"})
    assert {str(key) for key in lm.zero_state(1)} == {
        "0.recurrent.0", "0.recurrent.1", "1.conv.0", "1.conv.1"
    }  # fmt: skip
    assert wrapped("gru", batch_axis=1).model.tree == wrapped("gru", batch_axis={"state": -2}).model.tree
    for options, words in (
        ({"batch_axis": 0}, "batch_axis 0 of state"),
        ({"batch_axis": {"h": 0}}, "batch_axis: the state has no 'h'; it has state"),
        ({"part": {"state": "conv"}}, "no tensor of the state is recurrent"),
        ({"part": {"state": "memory"}}, "part of state: 'memory' is not"),
    ):
        with pytest.raises(LongrollError, match=re.escape(words)):
            wrapped("gru", **options)


class Lambda(nn.Module):
    """A linear recurrence that `change` may spoil: given (hidden, state) it returns both."""

    def __init__(self, change=lambda hidden, state: (hidden, state), start=lambda state: state):
        super().__init__()
        self.embedding, self.out = nn.Embedding(VOCAB, WIDTH), nn.Linear(WIDTH, VOCAB)
        self.change, self.start = change, start

    def forward(self, ids, state=None):
        h = torch.zeros(len(ids), WIDTH) if state is None else self.start(state)
        hs = []
        for x in self.embedding(ids).unbind(1):
            h = 0.9 * h + x
            hs.append(h)
        hidden, state = self.change(torch.stack(hs, dim=1), h)
        return self.out(hidden), state


class InPlace(Lambda):
    def forward(self, ids, state=None):
        state = torch.zeros(len(ids), WIDTH) if state is None else state
        hs = []
        for x in self.embedding(ids).unbind(1):
            state.mul_(0.9).add_(x.detach())
            hs.append(state.clone())
        return self.out(torch.stack(hs, dim=1)), state.clone()


class Remembers(Lambda):
    def forward(self, ids, state=None):
        kept = getattr(self, "kept", None)
        start = kept if state is None and kept is not None and len(kept) == len(ids) else state
        logits, state = super().forward(ids, start)
        self.kept = state.detach()
        return logits, state


class Learned(Lambda):
    def __init__(self):
        super().__init__()
        self.first = nn.Parameter(torch.ones(WIDTH))

    def forward(self, ids, state=None):
        return super().forward(ids, self.first.expand(len(ids), -1) if state is None else state)


class Dropped(Lambda):
    """Loses the state of texts of one token."""

    def forward(self, ids, state=None):
        return super().forward(ids, None if ids.shape[1] == 1 and state is not None and state.ndim else state)


def grow(hidden, state):
    return hidden, {"keys": hidden, "h": state}


@pytest.mark.parametrize(
    ("module", "words"),
    [
        (InPlace(), "writes in place into the state"),
        (Lambda(start=torch.Tensor.detach), "the gradient does not reach the initial state"),
        (Lambda(lambda hidden, state: (hidden, state.detach())), "the final state is detached"),
        (Lambda(start=lambda state: 0.5 * state), "a chunked forward differs from the full one"),
        (Dropped(), "a chunked forward differs from the full one"),
        (Remembers(), "give other logits a second time"),
        (Lambda(lambda hidden, state: (hidden + torch.rand(()), state)), "give other logits a second time"),
        (Learned(), "starts from something else than the zero state"),
        (
            Lambda(lambda hidden, state: (hidden[:, :-1], state)),
            "forward returns a tensor of shape (2, 2, 29)",
        ),
        (Lambda(lambda hidden, state: (hidden, None)), "returns NoneType as state"),
        (Lambda(lambda hidden, state: (hidden, {})), "returns a state without tensors"),
        (Lambda(lambda hidden, state: (hidden, {"h": state, "n": 3})), "returns int as n"),
        (Lambda(lambda hidden, state: (hidden, state.sum(0))), "no axis is the batch"),
        (Lambda(lambda hidden, state: (hidden, state @ state.mT)), "more than one axis may be the batch"),
        (Lambda(lambda hidden, state: (hidden, torch.complex(state, state))), "state is complex"),
        (Lambda(lambda hidden, state: (hidden, {"a.b": state, "a": {"b": state}})), "have one name"),
        (Lambda(grow), "needs its own family (longroll.register_family)"),
        (nn.Embedding(VOCAB, VOCAB), "forward(ids, state) fails where state is None"),
        (nn.GRU(2, 2), "forward(ids, state) fails where state is None"),
    ],
    ids=lambda value: value[:30] if isinstance(value, str) else type(value).__name__,
)
def test_what_is_wrong_is_named(module, words):
    with pytest.raises(LongrollError, match=re.escape(words)) as caught:
        longroll.wrap(module, vocab_size=VOCAB, name="mine")
    assert str(caught.value).startswith("mine") and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"module": "gru"}, "`module` is a str, not an nn.Module"),
        ({"module": zoo.build("mamba")}, "use longroll.RecurrentLM"),
        ({"module": zoo.lm_of("mamba")}, "is a RecurrentLM: it needs no wrap"),
        ({"vocab_size": 0}, "`vocab_size` is 0"),
        ({"vocab_size": 2.0}, "`vocab_size` is 2.0"),
        ({"train_length": -3}, "`train_length` is -3"),
        ({"head": "out"}, "`head` is 'out': give a submodule"),
        ({"head": nn.Linear(3, VOCAB)}, "`head` fails on what forward returns, a tensor of shape (2, 3, 29)"),
        ({"vocab_size": VOCAB + 1}, "and vocab_size is 30"),
    ],
)
def test_arguments_are_checked(arguments, words):
    with pytest.raises(LongrollError, match=re.escape(words)):
        longroll.wrap(**({"module": Recurrence(), "vocab_size": VOCAB} | arguments))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_weights_of_every_precision(dtype):
    lm = wrapped("stacked", dtype=dtype)
    assert {t.dtype for t in lm.zero_state(2).values()} == {dtype}
    again = lm.to(torch.float64)  # zeros that stand for missing parts follow the weights
    logits, state = again(tokens(2, 3), again.zero_state(2).part("recurrent"))
    assert {t.dtype for t in (logits, *state.values())} == {torch.float64}


class Named(typing.NamedTuple):
    h: torch.Tensor
    started: torch.Tensor


def test_named_tuples_and_flags():
    module = Lambda(lambda hidden, state: (hidden, Named(state, torch.ones(len(state)).bool())))
    module.start = lambda state: state.h
    lm = longroll.wrap(module, vocab_size=VOCAB)
    assert {leaf.path: leaf.part for leaf in lm.model.tree.leaves} == {
        "h": "recurrent",
        "started": "attention",
    }


@settings(max_examples=25, deadline=None, derandomize=True)
@given(st.lists(st.integers(1, 4), min_size=1, max_size=4), st.data())
def test_a_leaf_is_split_and_joined(shape, data):
    axis = data.draw(st.integers(0, len(shape) - 1))
    tensor = torch.randn(shape)
    keys = tuple(StateKey(i, "recurrent") for i in range(shape[0] if axis else 1))
    rest = tuple(size for i, size in enumerate(shape) if i != axis)
    leaf = Leaf("h", axis, "recurrent", rest, None, keys)
    parts = leaf.split(tensor)
    assert all(t.shape[0] == shape[axis] and t.ndim > 1 for t in parts.values())
    assert torch.equal(leaf.join(parts, shape[axis], tensor.dtype, tensor.device), tensor)
    zero = leaf.join({}, shape[axis], tensor.dtype, tensor.device)
    assert torch.equal(zero, torch.zeros_like(tensor))


def test_a_head_is_given_and_never_inferred():
    with pytest.raises(LongrollError, match=re.escape("If these are hidden states, give head=.")):
        longroll.wrap(Recurrence(head=False), vocab_size=VOCAB)
    square = Recurrence()
    assert longroll.wrap(square, vocab_size=VOCAB).head(torch.zeros(2, VOCAB)).shape == (2, VOCAB)
    with pytest.raises(LongrollError, match="head gives"):
        longroll.wrap(Recurrence(head=False), vocab_size=VOCAB, head=nn.Linear(WIDTH, VOCAB - 1))
    ids, targets = tokens(2, 8), tokens(2, 8, seed=1)
    gradients = []
    for kind in ("submodule", "beside", "method", "inside"):
        torch.manual_seed(0)
        module = Recurrence(head=kind == "inside")
        out = module.out
        if kind == "beside":
            module.out = nn.Identity()
        head = {"submodule": out, "beside": out, "method": lambda h, out=out: out(h), "inside": None}[kind]
        lm = longroll.wrap(module, vocab_size=VOCAB, head=head)
        assert lm(ids, logits=False)[0].shape[2] == lm.width == (VOCAB if kind == "inside" else WIDTH)
        assert {id(p) for p in lm.family.head_parameters(lm.model)} == (
            set() if kind == "inside" else {id(p) for p in out.parameters()}
        )
        F.cross_entropy(lm(ids)[0].flatten(0, 1), targets.flatten()).backward()
        gradients.append([p.grad for p in (*out.parameters(), module.decay)])
    for found in gradients[1:]:
        assert all(map(torch.equal, found, gradients[0]))


@pytest.mark.parametrize("cap", [False, True])
def test_the_loss_in_pieces_is_the_loss(monkeypatch, cap):
    """Whatever the last operation of the module or its head reads again for its own gradient."""
    from longroll.training import loss

    ids, targets = tokens(3, 20), tokens(3, 20, seed=1)

    def gradients(head, whole):
        torch.manual_seed(0)
        module = Recurrence(head=False)

        def logits(hidden):
            made = module.out(hidden)
            return made.log_softmax(-1) if cap else made

        if head:
            lm = longroll.wrap(module, vocab_size=VOCAB, head=logits)
        else:
            lm = longroll.wrap(_After(module, logits), vocab_size=VOCAB)
        monkeypatch.setattr(loss, "LOGITS", 1 << 29 if whole else 1)
        monkeypatch.setattr(loss, "_WIDTHS", 0)
        value, _ = loss.loss_and_state(lm, ids, targets)
        value.backward()
        return [value.detach(), *(p.grad for p in module.parameters())]

    expected = gradients(head=True, whole=True)
    out = F.cross_entropy(_reference(cap, ids), targets.flatten())
    torch.testing.assert_close(expected[0], out.detach())
    for head, whole in ((True, False), (False, True), (False, False)):
        for actual, right in zip(gradients(head, whole), expected, strict=True):
            torch.testing.assert_close(actual, right)


class _After(nn.Module):
    def __init__(self, module, logits):
        super().__init__()
        self.module, self.logits = module, logits

    def forward(self, ids, state=None):
        hidden, state = self.module(ids, state)
        return self.logits(hidden), state


def _reference(cap, ids):
    torch.manual_seed(0)
    logits = Recurrence()(ids)[0].flatten(0, 1)
    return logits.log_softmax(-1) if cap else logits


def test_integers_are_context_that_a_new_text_starts_without():
    module = Lambda(lambda hidden, state: (hidden, {"h": state, "read": torch.zeros(len(state)).long()}))
    module.start = lambda state: state["h"]
    lm = longroll.wrap(module, vocab_size=VOCAB)
    _, state = lm(tokens(2, 3))
    assert state[StateKey(0, "attention")].dtype == torch.long
    assert [key.part for key in state.part("recurrent", "conv")] == ["recurrent"]
    lm(tokens(2, 3), state.part("recurrent", "conv"))  # what is left out is zero
    with pytest.raises(LongrollError, match=r"the state holds 7\.recurrent"):
        lm(tokens(2, 3), RecurrentState({StateKey(7, "recurrent"): torch.zeros(2, 1)}))


@pytest.mark.parametrize("given", [nn.Linear(2, 2), "gru"])
def test_what_is_no_model_is_sent_to_wrap(given):
    with pytest.raises(LongrollError, match=r"longroll\.wrap"):
        longroll.RecurrentLM(given)


@every_module
def test_weights_stay_as_they_are(name):
    torch.manual_seed(0)
    module = MODULES[name]()
    before = {n: p.clone() for n, p in module.named_parameters()}
    lm = longroll.wrap(module, vocab_size=VOCAB)
    assert lm.model.module is module and not lm.training
    assert all(torch.equal(p, before[n]) and p.grad is None for n, p in module.named_parameters())
