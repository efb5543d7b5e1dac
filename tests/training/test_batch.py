"""What a batch says, and that what it says otherwise is refused by name."""

import pytest
import torch
from transformers import DataCollatorWithFlattening

from longroll import LongrollError
from longroll.training._batch import IGNORED, read_batch, row_starts
from longroll.training._collate import Collator

IDS = torch.arange(10, 34).view(2, 12)


def test_a_plain_batch_predicts_each_token_from_those_before_it():
    rows = read_batch({"input_ids": IDS, "labels": IDS, "attention_mask": torch.ones_like(IDS)})
    assert rows.attention_mask is None and rows.starts is None
    assert torch.equal(rows.targets[:, :-1], IDS[:, 1:]) and (rows.targets[:, -1] == IGNORED).all()


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_no_target_and_has_none(side):
    mask = torch.ones_like(IDS)
    mask[1, :5] = 0
    mask = mask if side == "left" else mask.flip(1)
    rows = read_batch({"input_ids": IDS, "labels": IDS, "attention_mask": mask})
    assert torch.equal(rows.attention_mask, mask.bool())
    counted = (rows.targets != IGNORED).sum(1).tolist()
    assert counted == [11, 6]  # each row one fewer than its tokens
    given = read_batch({"input_ids": IDS, "shift_labels": IDS, "attention_mask": mask})
    assert (given.targets != IGNORED).sum(1).tolist() == [12, 7]  # the last token's target is given


def packed(lengths):
    items = [{"input_ids": list(range(3, 3 + n))} for n in lengths]
    return DataCollatorWithFlattening(return_flash_attn_kwargs=True, return_seq_idx=True)(items)


@pytest.mark.parametrize("seed", range(4))
def test_all_keys_that_mark_documents_say_the_same(seed):
    lengths = [*torch.randint(1, 7, (4,), generator=torch.Generator().manual_seed(seed)).tolist(), 3]
    whole = packed(lengths)
    expected = torch.zeros(1, sum(lengths), dtype=torch.bool)
    expected[0, torch.tensor(lengths).cumsum(0)[:-1]] = True
    ids, labels = whole["input_ids"], whole["input_ids"].clone()
    for keys in (["position_ids"], ["seq_idx"], ["cu_seq_lens_q", "cu_seq_lens_k"], list(whole)):
        rows = read_batch({key: whole[key] for key in keys} | {"input_ids": ids, "labels": labels})
        assert torch.equal(rows.starts, expected), keys
        assert (rows.targets != IGNORED).sum() == sum(lengths) - len(lengths)
    starts = expected.clone()
    starts[:, 0] = True  # of the row's first document, which goes on from the intervention's state
    assert torch.equal(read_batch({"input_ids": ids, "labels": ids, "starts": starts}).starts, expected)
    assert row_starts({"starts": starts}).tolist() == [True] and row_starts(
        {"starts": expected}
    ).tolist() == [False]


def test_positions_that_pad_the_end_of_a_packed_row():
    positions = torch.tensor([[0, 1, 2, 0, 1, 0, 0, 0]])
    ids = torch.arange(3, 11)[None]
    rows = read_batch({"input_ids": ids, "labels": ids, "position_ids": positions})
    assert rows.attention_mask.tolist() == [[True] * 5 + [False] * 3]
    assert rows.starts.nonzero().tolist() == [[0, 3]]


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"loss_weights": torch.ones(2, 12)}, "loss_weights"),
        ({"inputs_embeds": torch.ones(2, 12, 4)}, "inputs_embeds"),
        ({"attention_mask": torch.ones(2, 1, 12, 12)}, "attention_mask"),
        ({"position_ids": torch.arange(5, 17).expand(2, -1)}, "position_ids"),
        ({"position_ids": torch.zeros(3, 2, 12)}, "position_ids"),
        ({"cu_seq_lens_q": torch.tensor([0, 5, 24])}, "cu_seq_lens_q"),
        ({"cu_seq_lens_q": torch.tensor([0, 5, 12])}, "cu_seq_lens_q"),  # of two rows
        ({"input_ids": IDS[:1], "cu_seq_lens_q": torch.tensor([0, 8, 4, 12])}, "cu_seq_lens_q"),
        ({"seq_idx": torch.zeros(2, 11)}, "seq_idx"),
        ({"labels": IDS[:, :4]}, "labels"),
        ({"labels": None}, "labels"),
        ({"input_ids": None}, "input_ids"),
        ({"starts": IDS == 15, "seq_idx": (IDS > 16).int()}, "seq_idx.*contradicts"),
    ],
)
def test_what_is_not_understood_is_refused_by_name(wrong, named):
    with pytest.raises(LongrollError, match=named):
        read_batch({"input_ids": IDS, "labels": IDS} | wrong)


class Tokenizer:
    pad_token_id, padding_side = 9, "right"


@pytest.mark.parametrize("side", ["left", "right"])
def test_ragged_rows_are_padded_with_a_mask(side):
    tokenizer = Tokenizer()
    tokenizer.padding_side = side
    batch = Collator(tokenizer)([{"input_ids": [1, 2, 3]}, {"input_ids": [4]}])
    row = {"left": [[9, 9, 4], [0, 0, 1], [-100, -100, 4]], "right": [[4, 9, 9], [1, 0, 0], [4, -100, -100]]}[
        side
    ]
    assert [batch[k][1].tolist() for k in ("input_ids", "attention_mask", "labels")] == row
    with pytest.raises(LongrollError, match="processing_class"):
        Collator()([{"input_ids": [1, 2, 3]}, {"input_ids": [4]}])


def test_columns_that_no_forward_takes_are_dropped_with_one_notice(caplog):
    rows = [{"input_ids": [1, 2], "text": "a", "id": 7, "meta": {"a": 1}}] * 2
    collate = Collator()
    batches = [collate(rows) for _ in range(2)]
    assert [record.getMessage().partition(": ")[2] for record in caplog.records] == ["id, meta, text"]
    assert set(batches[0]) == {"input_ids", "labels"}
    assert "weight" in collate([{"input_ids": [1, 2], "weight": [1.0, 2.0]}])  # refused by `read_batch`
    assert "id" in Collator(inner=lambda items: {**items[0]}, drop=False)(rows)
