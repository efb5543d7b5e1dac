"""Chat data: the loss is on the assistant's answers, whatever the template writes around them."""

import json

import numpy as np
import pytest

import longroll
from longroll import LongrollError
from longroll.data import ChatCorpus, ChatLanes, ChatWindows, HFTokenizer, is_chat, read_conversations

TEMPLATES = {
    "chatml": "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}",
    "inst": "<s>{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% else %} {{ m.content }}</s>{% endif %}{% endfor %}",
}


def tokenizer(template):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=made)
    fast.chat_template = template
    return HFTokenizer(fast, "chat")


def conversation(random, turns):
    def text():
        return "".join(random.choice(list("abc äö"), random.integers(1, 12)))

    roles = ["user", "assistant"] * turns
    return [{"role": role, "content": text()} for role in roles]


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("seed", range(3))
def test_answers_and_only_answers_are_learned(template, seed):
    random, tok = np.random.default_rng(seed), tokenizer(TEMPLATES[template])
    talks = [conversation(random, random.integers(1, 4)) for _ in range(4)]
    corpus = ChatCorpus.from_conversations(talks, tok)
    assert corpus.bytes == len(tok.decode(corpus.ids).encode())
    assert (corpus.separator_id, corpus.tokenizer) == (tok.separator_id, "chat")
    for number, talk in enumerate(talks):
        part = slice(corpus.offsets[number], corpus.offsets[number + 1])
        ids, learned = corpus.ids[part], corpus.answers[part]
        assert tok.decode(ids) == tok.tokenizer.apply_chat_template(talk, tokenize=False)
        said = [m["content"] for m in talk if m["role"] == "assistant"]
        end = {"chatml": "<|end|>\n", "inst": "</s>"}[template]
        start = {"chatml": "", "inst": " "}[template]
        assert tok.decode(ids[learned]) == "".join(start + answer + end for answer in said)


@pytest.mark.parametrize("lanes", [None, 3])
def test_windows_predict_each_answer_token_once(lanes):
    random, tok = np.random.default_rng(1), tokenizer(TEMPLATES["chatml"])
    corpus = ChatCorpus.from_conversations([conversation(random, 2) for _ in range(6)], tok)
    data = ChatLanes(corpus, 16, lanes) if lanes else ChatWindows(corpus, 16, seed=1)
    items = [data[i] for i in range(len(data))]
    targets = [t for item in items for t in item["shift_labels"].tolist() if t != -100]
    assert sorted(targets) == sorted(corpus.ids[corpus.answers].tolist())
    for item in items:
        real = int(item["attention_mask"].sum())
        assert (item["shift_labels"][real:] == -100).all() and (item["input_ids"][real:] == 0).all()
        assert lanes or (item["shift_labels"] != -100).any()
    assert getattr(data, "lanes", None) == lanes


@pytest.mark.parametrize("kind", [ChatWindows, lambda corpus, length: ChatLanes(corpus, length, 1)])
def test_a_window_tells_whether_it_begins_a_conversation(kind):
    talk = [{"role": "assistant", "content": "abcdefghijklmnopqrst"}]
    corpus = ChatCorpus.from_conversations([talk], tokenizer(TEMPLATES["chatml"]))
    data = kind(corpus, 8)
    items = [data[i] for i in range(len(data))]
    begins = [item["input_ids"].tolist() == corpus.ids[:8].tolist() for item in items]
    assert [bool(item["starts"]) for item in items] == begins and sum(begins) == 1 < len(items)


def test_files_of_messages(tmp_path):
    talk = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    file = tmp_path / "chat.jsonl"
    file.write_text("\n".join(json.dumps({"messages": talk, "id": i}) for i in range(20)))
    assert is_chat(file) and not is_chat(tmp_path)
    sizes = [len(list(read_conversations(file, split=split))) for split in ("all", "train", "validation")]
    assert sizes == [20, 18, 2]
    plain = tmp_path / "plain.jsonl"
    plain.write_text('{"text": "a"}')
    assert not is_chat(plain)
    file.write_text(json.dumps({"messages": talk}) + '\n{"messages": "a"}')
    with pytest.raises(LongrollError, match="row 2 holds no messages"):
        list(read_conversations(file))
    import pyarrow as pa
    import pyarrow.parquet

    pa.parquet.write_table(pa.Table.from_pylist([{"messages": talk}]), tmp_path / "chat.parquet")
    assert is_chat(tmp_path / "chat.parquet") and list(read_conversations(tmp_path / "chat.parquet")) == [
        talk
    ]


@pytest.mark.parametrize(
    ("template", "talk", "said"),
    [
        (None, [{"role": "assistant", "content": "a"}], "no chat template"),
        (TEMPLATES["chatml"], [{"role": "user", "content": "a"}], "No conversation has an answer"),
        ("{{ raise_exception('no') }}", [{"role": "assistant", "content": "a"}], "refuses row 1: no"),
        ("{{ messages[-1].content }}", conversation(np.random.default_rng(0), 2), "row 1 another text"),
    ],
)
def test_what_has_no_answers(template, talk, said):
    with pytest.raises(LongrollError, match=said):
        ChatCorpus.from_conversations([talk], tokenizer(template))


def test_chat_on_the_command_line(tmp_path):
    from typer.testing import CliRunner

    from longroll.cli import app
    from zoo import build

    tok = tokenizer(TEMPLATES["chatml"])
    model = build("mamba2", vocab_size=256)
    model.config.train_length = 16
    model.save_pretrained(tmp_path / "model")
    tok.tokenizer.save_pretrained(tmp_path / "model")
    random = np.random.default_rng(0)
    talks = [json.dumps({"messages": conversation(random, 2)}) for _ in range(20)]
    (tmp_path / "chat.jsonl").write_text("\n".join(talks))
    for intervention in ("sp", "tbptt"):
        command = ["posttrain", str(tmp_path / "model"), "--text", str(tmp_path / "chat.jsonl")]
        command += ["--steps", "3", "--batch-size", "2", "--device", "cpu", "--intervention", intervention]
        result = CliRunner().invoke(app, [*command, "--output", str(tmp_path / intervention)])
        assert result.exit_code == 0, result.output
        assert longroll.load(tmp_path / intervention, device="cpu").train_length == 16
