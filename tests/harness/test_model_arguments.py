"""Arguments of lm_eval's model type: honoured, dropped with one notice, or refused by name."""

import numpy as np
import pytest

import zoo
from tokenizer_kinds import trained

pytest.importorskip("lm_eval", reason="pip install 'longroll[lm-eval]'")

from lm_eval.api.instance import Instance

from longroll.errors import LongrollError
from longroll.harness import MOST_PROMPTS, LongrollLM
from longroll.harness_arguments import DROPPED, NEUTRAL, TAKEN, help_text, with_defaults

TEXT = "The grass is green. The sky is blue."


def saved(folder, **tokens) -> str:
    """A tiny Mamba-2 with a tokenizer of its own."""
    zoo.build("mamba2", vocab_size=340, pad_token_id=None).save_pretrained(folder)
    trained("bytes", **tokens).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    return saved(tmp_path_factory.mktemp("model"), bos="<s>", eos="</s>", add_bos=True)


def ask(lm: LongrollLM, kind: str, *arguments: tuple):
    requests = [Instance(kind, {}, one, number) for number, one in enumerate(arguments)]
    return getattr(lm, kind)(requests, disable_tqdm=True)


class TestUsualArguments:
    def test_dropped_with_one_notice(self, folder, caplog):
        neutral = {name: values[0] for name, values in NEUTRAL.items()} | {"peft": None, "revision": "main"}
        lm = LongrollLM(folder, **neutral, **dict.fromkeys(DROPPED, 2048))
        (record,) = [record for record in caplog.records if "dropped" in record.getMessage()]
        assert all(name in record.getMessage() for name in DROPPED) and lm.batch_size >= 1

    @pytest.mark.parametrize(
        "others", [{"parallelize": True}, {"peft": "x"}, {"revision": "v2"}, {"attn_implementation": "eager"},
                   {"no_such": 1}, {"max_length": 9, "truncation": True}],
    )  # fmt: skip
    def test_refused_by_name(self, folder, others):
        name = list(others)[-1]
        with pytest.raises(LongrollError, match=rf"--model_args .*{name}=.* it takes pretrained"):
            LongrollLM(folder, **others)

    @pytest.mark.parametrize(
        ("told", "named"),
        [({"batch_size": 0}, "batch_size=0"), ({"batch_size": "x"}, "batch_size=x"),
         ({"max_batch_size": -1}, "max_batch_size"), ({"chunk_size": "a"}, "chunk_size=a")],
    )  # fmt: skip
    def test_numbers_that_count_nothing(self, folder, told, named):
        with pytest.raises(LongrollError, match=named):
            LongrollLM(folder, **told)

    def test_no_model(self):
        with pytest.raises(LongrollError, match="pretrained=MODEL"):
            LongrollLM()

    def test_help_lists_them_all(self):
        assert all(name in help_text() for name in (*TAKEN, *DROPPED))


def test_the_batch_size_is_chosen(folder):
    for size in (None, "auto", "auto:4"):
        assert 1 < LongrollLM(folder, batch_size=size).batch_size <= MOST_PROMPTS
    assert LongrollLM(folder, batch_size="auto", max_batch_size=3).batch_size == 3
    assert LongrollLM(folder, batch_size="7").batch_size == 7
    made = LongrollLM.create_from_arg_string(f"pretrained={folder},batch_size=5", {"batch_size": 1})
    assert made.batch_size == 5
    assert LongrollLM.create_from_arg_obj({"pretrained": folder}, {"batch_size": 2}).batch_size == 2


@pytest.mark.parametrize(
    ("arguments", "added"),
    [
        (["--tasks", "x"], ["--model", "longroll", "--batch_size", "auto"]),
        (["--model", "longroll", "--tasks", "x"], ["--batch_size", "auto"]),
        (["--model=longroll", "-b", "4"], []),
        (["-M", "hf", "--tasks", "x"], []),
        (["--config", "c.yaml"], []),
        (["ls", "tasks"], []),
        ([], []),
    ],
)
def test_defaults_of_the_command(arguments, added):
    assert with_defaults(arguments) == [*arguments, *added]


def test_chunks_change_no_score(folder):
    pairs = [(TEXT, " The sun"), (TEXT * 3, " is yellow")]
    scores = [ask(LongrollLM(folder, chunk_size=size), "loglikelihood", *pairs) for size in (None, 5)]
    assert np.allclose([x for x, _ in scores[0]], [x for x, _ in scores[1]], atol=1e-4)


class TestBeginningAndEnd:
    @pytest.mark.parametrize("adds", [True, False])
    def test_the_flag_decides(self, tmp_path, adds):
        path = saved(tmp_path, bos="<s>", eos="</s>", add_bos=adds)
        for asked, expected in ((None, adds), (True, True), (False, False)):
            lm = LongrollLM(path, add_bos_token=asked)
            assert (lm.tok_encode(TEXT)[0] == 0) == expected
            assert lm.tok_encode(f"<s>{TEXT}").count(0) == 1  # what begins with BOS gets no second one
            assert 0 not in lm.tok_encode(TEXT, add_special_tokens=False)

    def test_neither_bos_nor_eos(self, tmp_path, caplog):
        path = saved(tmp_path)
        lm = LongrollLM(path)
        assert "has no EOS" in caplog.text
        assert len(ask(lm, "loglikelihood", (TEXT, " The sun"))) == 1
        (text,) = ask(lm, "generate_until", (TEXT, {"until": [], "max_gen_toks": 5}))
        assert isinstance(text, str)
        for kind, request in (("loglikelihood", ("", "The")), ("loglikelihood_rolling", (TEXT,))):
            with pytest.raises(LongrollError, match=r"neither BOS nor EOS.*prefix_token_id"):
                ask(lm, kind, request)
            assert ask(LongrollLM(path, prefix_token_id=3), kind, request)

    def test_no_eos(self, tmp_path):
        lm = LongrollLM(saved(tmp_path, bos="<s>", add_bos=True))
        assert lm.eot_token_id is None and lm.prefix_token_id == 0
        assert ask(lm, "generate_until", (TEXT, {"until": ["z"], "max_gen_toks": 5}))

    def test_bytes_have_no_bos(self):
        with pytest.raises(LongrollError, match="`bos`: the tokens are bytes"):
            LongrollLM("specimen", add_bos_token=True)


class TestGeneration:
    @pytest.mark.parametrize("option", [{"num_beams": 4}, {"repetition_penalty": 1.2}, {"do_sample": True}])
    def test_what_is_not_greedy_is_refused(self, folder, option):
        with pytest.raises(LongrollError, match=f"{next(iter(option))}=.*greedily"):
            ask(LongrollLM(folder), "generate_until", (TEXT, {"until": [], **option}))

    def test_what_changes_nothing_is_taken(self, folder):
        options = {"do_sample": False, "temperature": 0.0, "top_p": 0.9, "num_beams": 1, "max_gen_toks": 3}
        assert ask(LongrollLM(folder), "generate_until", (TEXT, {"until": ["\n"], **options}))

    def test_answers_follow_the_reasoning(self, folder):
        whole = ask(LongrollLM(folder), "generate_until", (TEXT, {"until": [], "max_gen_toks": 12}))[0]
        mark = whole[4:8]  # of digits alone it would be an id, as in hf
        for told in (mark, None):
            lm = LongrollLM(folder, think_end_token=told)
            (text,) = ask(lm, "generate_until", (TEXT, {"until": [], "max_gen_toks": 12}))
            assert text == (whole if told is None else whole.split(mark)[-1].lstrip())

    def test_the_chat_template_is_told(self, folder):
        lm = LongrollLM(folder, enable_thinking=True, chat_template_args={"place": "here"})
        lm.tokenizer.chat_template = "{{ place }} {{ enable_thinking }} {{ messages[0].content }}"
        assert lm.apply_chat_template([{"role": "user", "content": "x"}]) == "here True x"
