import time

import pytest

from longroll.data import _hub, read_documents
from longroll.errors import LongrollError

ROWS = {
    "both": {"train": 12, "test": 3},
    "single": {"train": 30},
}


@pytest.fixture
def hub(monkeypatch):
    """A hub with two datasets: streams as `datasets` makes them, with nothing fetched."""
    import datasets

    def load(name, config=None, *, streaming):
        assert streaming
        if config == "none":
            raise ValueError("BuilderConfig 'none' not found.\nAvailable: ['default']")
        return datasets.IterableDatasetDict(
            {
                split: datasets.IterableDataset.from_generator(
                    lambda split=split, count=count: (
                        {"text": f"{split} {i}", "url": "u"} for i in range(count)
                    )
                )
                for split, count in ROWS[name].items()
            }
        )

    monkeypatch.setattr(datasets, "load_dataset", load)
    monkeypatch.setattr(_hub, "why_not_there", lambda name, kind: None)


def test_own_splits(hub):
    assert list(read_documents("both", split="test")) == ["test 0", "test 1", "test 2"]
    assert len(list(read_documents("both", split="train"))) == 12
    assert len(list(read_documents("both:default", split="all"))) == 15


def test_train_alone_is_divided(hub):
    assert list(read_documents("single", split="validation")) == ["train 0", "train 13", "train 26"]
    assert len(list(read_documents("single", split="train"))) == 27


def test_errors_name_what_there_is(hub):
    with pytest.raises(LongrollError, match="no split 'validation': name one of train, test"):
        list(read_documents("both", split="validation"))
    with pytest.raises(LongrollError, match=r"'none' not found. Available: \['default'\]"):
        list(read_documents("both:none"))
    with pytest.raises(LongrollError, match=r"no column 'story'.*text, url"):
        list(read_documents("both", text_column="story"))


def test_a_stream_that_breaks(hub, monkeypatch):
    def texts(*arguments):
        yield "first"
        raise OSError("connection\nlost")

    monkeypatch.setattr(_hub, "texts", texts)
    documents = read_documents("both", split="test")
    assert next(documents) == "first"
    with pytest.raises(LongrollError, match="reading dataset 'both' failed: connection lost"):
        next(documents)


def test_unreachable_is_said_soon(monkeypatch):
    import huggingface_hub

    class Nowhere(huggingface_hub.HfApi):
        def __init__(self):
            super().__init__(endpoint="http://127.0.0.1:9")  # the discard port: refused at once

    monkeypatch.setattr(huggingface_hub, "HfApi", Nowhere)
    began = time.monotonic()
    with pytest.raises(LongrollError, match=r"(?s)no such file or folder here.*offline.*local path") as error:
        next(read_documents("some/dataset"))
    assert time.monotonic() - began < 10
    assert error.value.__suppress_context__ or error.value.__context__ is None  # no traceback of the client


def test_the_hub_is_asked_for_this_kind_and_for_seconds(monkeypatch):
    import huggingface_hub

    class Hub:
        def repo_info(self, name, **options):
            assert (name, options) == ("some/dataset", {"repo_type": "dataset", "timeout": _hub.SECONDS})

    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    assert _hub.why_not_there("some/dataset", "dataset") is None


def test_offline_mode(monkeypatch):
    import datasets
    from huggingface_hub import constants

    def load(*arguments, **options):
        raise ConnectionError("Couldn't reach 'some/dataset' on the Hub (OfflineModeIsEnabled)")

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets, "load_dataset", load)
    with pytest.raises(LongrollError, match=r"offline mode is on.*a local path works too"):
        next(read_documents("some/dataset"))
