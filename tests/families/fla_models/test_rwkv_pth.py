"""BlinkDL's `.pth` files: the logits of their own formulas, and clear refusals."""

import pytest
import torch

import longroll
from families.fla_models.blinkdl import Sizes, read_6, read_7, weights_6, weights_7
from longroll.errors import LongrollError
from longroll.families.fla_models import RWKV6ForCausalLM, RWKV7ForCausalLM
from zoo import assert_close

VERSIONS = {
    "7": (weights_7, read_7, RWKV7ForCausalLM),
    "6": (weights_6, read_6, RWKV6ForCausalLM),
}
every_version = pytest.mark.parametrize("version", VERSIONS)


def text(sizes: Sizes, rows: int = 2, length: int = 40) -> torch.Tensor:
    return torch.randint(sizes.vocab, (rows, length), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def file(tmp_path):
    def write(weights, name="RWKV-tiny.pth") -> str:
        path = tmp_path / name
        torch.save(weights, path)
        return str(path)

    return write


@every_version
@pytest.mark.parametrize(
    "sizes",
    [Sizes(), Sizes(vocab=300, layers=1, heads=1, head=64), Sizes(layers=3, heads=4, head=8, ffn=64, rank=5)],
    ids=["bytes", "one_layer", "three_layers"],
)
def test_logits_are_those_of_the_formulas(version, sizes, file):
    make, read, model_class = VERSIONS[version]
    weights = make(sizes)
    lm = longroll.load(file(weights), dtype=torch.float64)
    assert type(lm.model) is model_class
    assert lm.vocab_size == sizes.vocab
    assert [layer.shape for layer in lm.layers] == [(sizes.heads, sizes.head, sizes.head)] * sizes.layers
    ids = text(sizes)
    exact = {name: tensor.double() for name, tensor in weights.items()}
    expected = torch.stack([read(exact, row) for row in ids])
    with torch.no_grad():
        logits, state = lm(ids[:, :23])
        rest, _ = lm(ids[:, 23:], state)
    assert_close(torch.cat([logits, rest], dim=1), expected, 1e-9)


@every_version
@torch.no_grad()
def test_a_file_goes_on_as_an_ordinary_checkpoint(version, file, tmp_path):
    make, _, model_class = VERSIONS[version]
    weights = make(Sizes())
    narrow = {
        name: t if "decay" in name or name.endswith("w0") else t.bfloat16() for name, t in weights.items()
    }
    lm = longroll.load(file(narrow), dtype="auto")
    assert lm.model.dtype == torch.bfloat16
    lm.model.save_pretrained(tmp_path / "folder")
    again = longroll.load(tmp_path / "folder", dtype="auto")
    assert type(again.model) is model_class
    ids = text(Sizes())
    assert torch.equal(again(ids)[0], lm(ids)[0])


@every_version
def test_what_is_missing_or_left_over_is_named(version, file):
    make, _, _ = VERSIONS[version]
    weights = make(Sizes())
    gone = weights.pop("blocks.1.ffn.value.weight")
    with pytest.raises(LongrollError, match=r"missing \['model.layers.1.ffn.value.weight'\]"):
        longroll.load(file(weights))
    with pytest.raises(LongrollError, match=r"extra \['model.layers.1.ffn.s_emb.weight'\]"):
        longroll.load(file(weights | {"blocks.1.ffn.value.weight": gone, "blocks.1.ffn.s_emb.weight": gone}))
    with pytest.raises(LongrollError, match=r"model.layers.1.ffn.value.weight has shape \(96, 32\)"):
        longroll.load(file(weights | {"blocks.1.ffn.value.weight": gone.t()}))
    with pytest.raises(LongrollError, match=r"not a whole RWKV checkpoint.*emb\.weight"):
        longroll.load(file({name: t for name, t in weights.items() if name != "emb.weight"}))


def test_the_name_tells_the_training_length(file):
    weights = weights_7(Sizes())
    assert longroll.load(file(weights, "RWKV-x070-Pile-168M-20241120-ctx4096.pth")).train_length == 4096
    assert longroll.load(file(weights)).train_length is None


def test_other_files_are_refused(file, tmp_path):
    with pytest.raises(LongrollError, match=r"gone\.pth does not exist"):
        longroll.load(str(tmp_path / "gone.pth"))
    with pytest.raises(LongrollError, match=r"neither RWKV-7 .* nor RWKV-6"):
        longroll.load(file({"emb.weight": torch.zeros(2, 2), "blocks.0.att.time_mix_k": torch.zeros(2)}))
    with pytest.raises(LongrollError, match="must hold a state dict"):
        longroll.load(file({"epoch": 3}))
    with pytest.raises(LongrollError, match="cannot be read as plain weights"):
        longroll.load(file({"emb.weight": Sizes()}))  # a pickle that would run code
