"""Tasks under tokenizers that mark beginnings of words and texts in different ways."""

from importlib.util import find_spec

import numpy as np
import pytest

from longroll.data import ByteTokenizer, Corpus, HFTokenizer
from longroll.errors import LongrollError
from longroll.tasks import BABILong, Copying, Niah, Passkey, Story, TextHaystack
from longroll.tasks.babilong import QAS
from longroll.tasks.baselines import last_window
from tokenizer_kinds import trained

KINDS = ("bytes", "prefix space", "sentencepiece")
STORIES = [Story(("Mary moved to the bathroom.", "John went to the hallway."), "Where is Mary?", "bathroom")]
CHAT = (
    "{{ bos_token }}{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)


def tokenizer_of(kind: str, *, chat: str | None = None, bos: bool | None = None, add_bos=True) -> HFTokenizer:
    made = trained(kind, bos="<s>", eos="</s>", add_bos=add_bos)
    made.chat_template = chat
    return HFTokenizer(made, kind, bos=bos)


def tasks(tokenizer, **told) -> list:
    return [
        Passkey(tokenizer, **told),
        Passkey(tokenizer, instruction=False, **told),
        Niah(tokenizer, new_tokens=24, **told),
        BABILong(tokenizer, "qa1", STORIES, **told),
        BABILong(tokenizer, "qa1", STORIES, few_shot=False, **told),
    ]


def drawn(task, seed: int = 0):
    return task.sample(0 if task.name == "babilong" else 1500, rng=np.random.default_rng(seed))


@pytest.mark.parametrize("bos", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_pieces_are_the_tokens_of_their_text(kind, bos):
    """A prompt has as many tokens as its text read as a whole, and BOS once and first."""
    tokenizer = tokenizer_of(kind, bos=bos)
    for task in tasks(tokenizer):
        sample = drawn(task)
        ids = sample.tokens[sample.prefix :]
        assert sample.prefix == bos and (sample.tokens[: sample.prefix] == 0).all() and (ids != 0).all()
        text = tokenizer.decode(ids)
        assert "  " not in text and sample.target in text
        assert abs(len(tokenizer.encode(text)) - len(ids)) <= 3  # cut haystacks, a line break before a word


@pytest.mark.parametrize("kind", KINDS)
def test_the_right_number_is_right_however_it_is_written(kind):
    tokenizer = tokenizer_of(kind)
    for seed in range(5):
        sample = drawn(task := Passkey(tokenizer), seed)
        whole = tokenizer.encode(f"is {sample.target}")[len(tokenizer.encode("is")) :]
        for written in (sample.answer, whole):
            assert task.score(sample, written) == {"accuracy": 1.0}
        wrong = tokenizer.encode_inside(f" {int(sample.target) - 1}")
        assert task.score(sample, wrong) == {"accuracy": 0.0}
        assert task.score(sample, np.concatenate([sample.answer[:-1], wrong[-1:]])) == {"accuracy": 0.0}


@pytest.mark.parametrize("kind", KINDS)
def test_letters_are_copied_as_they_are_inside_a_string(kind):
    task = Copying(tokenizer_of(kind))
    sample = task.sample(12, rng=np.random.default_rng(0))
    start, stop = sample.context
    tokenizer = task.tokenizer
    assert tokenizer.decode_inside(sample.prompt[sample.prefix :]).strip() == f"${sample.target}|"
    assert tokenizer.decode_inside(sample.prompt[start:stop]) == sample.target
    assert task.score(sample, sample.answer, sample.answer)["free_string"] == 1.0


def test_a_haystack_of_documents_has_no_beginnings_inside():
    tokenizer = tokenizer_of("bytes")
    corpus = Corpus.from_texts(["The sky is blue. " * 9] * 5, tokenizer)
    sample = Passkey(tokenizer, haystack=TextHaystack(corpus, "t")).sample(900, rng=np.random.default_rng(0))
    assert (sample.prompt == 0).sum() == 1


def test_a_sliding_window_begins_as_any_text(monkeypatch):
    seen = []
    monkeypatch.setattr("longroll.tasks.baselines.prefill", lambda lm, prompts: seen.extend(prompts) or [])
    sample = drawn(Passkey(tokenizer_of("bytes")))
    last_window(50)(None, [sample])
    assert seen[0].tolist() == [0, *sample.prompt[-49:].tolist()]


class TestChatTemplate:
    @pytest.mark.parametrize("kind", KINDS)
    def test_the_prompt_is_one_message_of_the_user(self, kind):
        tokenizer = tokenizer_of(kind, chat=CHAT)
        for task in tasks(tokenizer, chat_template=True):
            sample = drawn(task)
            text = tokenizer.decode(sample.prompt)
            _, rest = text.split("<s>")
            user, model = rest.split("<|assistant|>")
            content = user.split("<|user|>")[1]
            cue = {"passkey": "The secret number is", "niah": "The number that belongs to", "babilong": ""}
            assert model.strip().startswith(cue[task.name]) and bool(model.strip()) == bool(cue[task.name])
            messages = [{"role": "user", "content": content.strip("\n")}]
            render = tokenizer.tokenizer.apply_chat_template
            whole = render(messages, tokenize=False, add_generation_prompt=True) + model
            assert "".join(whole.split()) == "".join(text.split())
            assert (sample.prompt == 0).sum() == 1 and sample.prompt[0] == 0
            assert task.settings()["chat_template"] is True

    def test_bos_follows_the_template_unless_told(self):
        bare = CHAT.replace("{{ bos_token }}", "")
        for chat, bos, expected in (
            (CHAT, None, 1), (CHAT, True, 1), (CHAT, False, 0),
            (bare, None, 0), (bare, True, 1), (bare, False, 0),
        ):  # fmt: skip
            sample = drawn(Passkey(tokenizer_of("bytes", chat=chat, bos=bos), chat_template=True))
            assert (sample.prompt == 0).sum() == expected and sample.prefix == expected

    @pytest.mark.parametrize(
        ("template", "message"),
        [
            (None, "has no chat template"),
            ("{{ raise_exception('no') }}", "fails: no"),
            ("{{ messages[0].nothing.at_all }}", "fails"),
            ("{% if", "fails"),
            ("hello", "0 times, not once"),
            ("{{ messages[0].content }}{{ messages[0].content }}", "2 times, not once"),
        ],
    )
    def test_what_gives_no_frame_is_refused(self, template, message):
        with pytest.raises(LongrollError, match=message):
            Passkey(tokenizer_of("bytes", chat=template), chat_template=True)

    def test_bytes_have_none(self):
        for make in (Passkey, Niah):
            with pytest.raises(LongrollError, match="bytes, which have no chat template"):
                make(ByteTokenizer(), chat_template=True)


class TestOfficialPrompts:
    def test_refused_without_the_package_or_by_another_name(self, monkeypatch):
        monkeypatch.setattr("longroll.tasks.official.find_spec", lambda name: None)
        for make in (lambda **told: Niah(ByteTokenizer(), **told),
                     lambda **told: BABILong(ByteTokenizer(), "qa1", STORIES, **told)):  # fmt: skip
            with pytest.raises(LongrollError, match=r"`prompts` official: .*pip install"):
                make(prompts="official")
            with pytest.raises(LongrollError, match="`prompts` other is not one of own, official"):
                make(prompts="other")

    def test_they_come_with_examples(self):
        with pytest.raises(LongrollError, match="`few_shot`"):
            BABILong(ByteTokenizer(), "qa1", STORIES, few_shot=False, prompts="official")

    @pytest.mark.skipif(find_spec("lm_eval") is None, reason="pip install 'longroll[lm-eval]'")
    def test_they_are_those_of_the_package(self):
        task = Niah(ByteTokenizer(), new_tokens=24, prompts="official")
        text = task.tokenizer.decode((sample := drawn(task)).prompt)
        assert text.startswith("A special magic number is hidden") and text.endswith("provided text is")
        assert f" is: {sample.target}.\n" in text and "{" not in text
        assert task.settings()["prompts"] == "official" != Niah(ByteTokenizer()).settings()["prompts"]
        for qa in QAS:
            task = BABILong(ByteTokenizer(), qa, STORIES, prompts="official")
            text = task.tokenizer.decode(drawn(task).prompt)
            assert "Do not write anything else" in text and text.endswith("hallway.\nWhere is Mary?")

    @pytest.mark.skipif(find_spec("lm_eval") is None, reason="pip install 'longroll[lm-eval]'")
    def test_a_package_that_changed_is_named(self, tmp_path, monkeypatch):
        monkeypatch.setattr("longroll.tasks.official._folder", lambda task: tmp_path)
        for make in (lambda: Niah(ByteTokenizer(), prompts="official"),
                     lambda: BABILong(ByteTokenizer(), "qa1", STORIES, prompts="official")):  # fmt: skip
            with pytest.raises(LongrollError, match="does not hold them"):
                make()
