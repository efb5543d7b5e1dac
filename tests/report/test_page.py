import json
import math
import re
from html import unescape

import pytest
from markup import Markup
from synthetic import KINDS, run, runs

from longroll.errors import LongrollError
from longroll.report import render, write_report

SECTIONS = ("curve", "levels", "states", "remembrance", "coverage", "tasks", "provenance")


@pytest.fixture(scope="module")
def page():
    return render(runs("base", "state passing"))


def headings(page):
    return re.findall(r"<h2>(.*?)</h2>", page)


def test_page_is_balanced_and_its_ids_are_unique(page):
    markup = Markup(page)
    assert len(markup.ids) == len(set(markup.ids)) > 0
    assert markup.tags.count("h1") == 1


def test_page_fetches_nothing(page):
    assert all(link.startswith("#") for link in Markup(page).links)
    assert "@import" not in page
    assert "<script" not in page
    assert set(re.findall(r"url\(([^)]*)\)", page)) == {m for m in re.findall(r"url\((#[^)]*)\)", page)}
    assert set(re.findall(r"https?://[^\s\"'<>]+", page)) == {
        "http://www.w3.org/2000/svg"
    }  # a name, no fetch


def poisoned(value, text, key=""):
    """A result whose names and sentences end in `text`."""
    if isinstance(value, dict):
        return {name: poisoned(one, text, name) for name, one in value.items()}
    if isinstance(value, list):
        return [poisoned(one, text, key) for one in value]
    fixed = key in ("kind", "verdict", "date", "part", "distance") or not isinstance(value, str)
    return value if fixed else value + text


@pytest.mark.parametrize(
    "text", ["</td><script>a</script>", "\"'><img src=x onerror=a>", "&amp;<b>", "$x^{$"]
)
def test_names_and_sentences_are_text_on_the_page(text, page):
    hostile = [poisoned(json.loads(json.dumps(one, default=list)), text) for one in runs("base", "sp")]
    markup = Markup(render(hostile, title=text))
    named = [tag for tag in ("script", "img") if tag in markup.tags]
    assert not named and markup.tags.count("b") == Markup(render(runs("base", "sp"))).tags.count("b")
    shown = "".join(unescape(render(hostile, title=text)).split())
    assert "".join(text.split()) in shown


def test_every_reference_inside_the_page_is_there(page):
    ids = set(Markup(page).ids)
    assert set(re.findall(r"(?:url\(#|href=\"#)([^)\"]+)", page)) <= ids


def test_same_runs_same_page(page):
    assert render(runs("base", "state passing")) == page


def test_verdict_comes_first_base_then_repair(page):
    body = page[page.index("<body>") :]
    assert body.index("Breaks at t") < body.index("Holds to 16k") < body.index("<table")
    assert "state passing takes perplexity from 47.3 to 4.36" in body


def test_advice_is_given_for_the_base_alone():
    advice = "Leave it alone"
    assert render([run("tbptt")]).count(advice) == 1
    assert advice not in render(runs("base", "tbptt", "sp"))


def test_advice_names_arguments_without_backticks():
    base = run("base")
    base["advice"]["sentence"] = "Read it with an attention window (`reading` window)."
    page = render([base])
    assert "(reading window)" in page and "`reading`" not in page


def test_ranges_are_set_with_dashes_that_do_not_break():
    assert "Breaks at t\u00a0≈\u00a0212" in render([run("base")])
    assert "at 8k\u2060\u2013\u206016k it is" in render([run("base")])


def test_all_sections_in_order(page):
    assert headings(page) == [
        "Loss by length",
        "Perplexity by position",
        "Loss above a fresh start",
        "The state over position",
        "Effective remembrance",
        "Remembrance at every length",
        "Coverage by layer and head",
        "Passkey",
        "How this was made",
    ]
    assert "longroll diagnose /models/mamba2-tiny-base --train-length 128" in page
    assert "torch 2.9.0" in page


def test_levels_show_the_price_and_the_gain(page):
    assert re.search(r'class="worse">\+0\.22<', page)
    assert re.search(r'class="better">−2\.38<', page)  # noqa: RUF001


@pytest.mark.parametrize("missing", SECTIONS)
@pytest.mark.parametrize("how", ["null", "absent"])
def test_missing_section_is_left_out(missing, how):
    pair = runs("base", "tbptt")
    for one in pair:
        one[missing] = None
        if how == "absent":
            del one[missing]
    Markup(render(pair))


def test_a_bare_verdict_is_a_page():
    bare = {"kind": "diagnosis", "label": "base", "verdict": "fades"}
    page = render([bare])
    Markup(page)
    assert "Fades past its training length." in page
    assert headings(page) == ["How this was made"]


def test_section_held_by_only_one_run():
    Markup(render([run("base", tasks=None, coverage=None), run("tbptt", states=None, remembrance=None)]))


def test_one_run_has_no_comparison():
    page = render([run("base")])
    Markup(page)
    assert "the difference to" not in page
    assert 'class="compared"' not in page


def test_runs_are_ordered_base_first():
    page = render(runs("tbptt", "state passing", "fitted noise", "random noise", "none", "base"))
    Markup(page)
    head = page[page.index("<thead>") : page.index("</thead>")]
    assert re.findall(r'class="run"[^>]*>([^<]+)<', head) == list(KINDS)


def test_runs_with_the_same_label_or_equal_contents_stay_apart():
    page = render([run("base"), run("sp"), run("sp"), run("sp")])
    Markup(page)
    assert "sp (2)" in page
    assert "sp (3)" in page


def test_null_nan_and_infinity_are_drawn_around():
    broken = run("base")
    for name in ("loss", "low", "high"):
        broken["curve"][name][-6:] = [None, math.nan, math.inf, 800.0, None, None]
    broken["levels"] |= {"64x": None, "far": math.nan}
    broken["states"]["layers"][0]["std"][-3:] = [math.inf, None, math.nan]
    broken["coverage"]["map"][0][0] = None
    broken["tasks"]["passkey"]["accuracy"][0][0] = None
    broken["remembrance"]["mean"][3][0] = None
    page = render([broken, run("state passing")])
    Markup(page)
    assert not re.search(r"\b(nan|inf)\b", re.sub(r"<[^>]*>", "", page[page.index("<body>") :]), re.I)


def test_all_values_missing():
    empty = run("base")
    empty["curve"] |= {name: [None] * len(empty["curve"]["loss"]) for name in ("loss", "low", "high")}
    empty["levels"] = dict.fromkeys(empty["levels"])
    Markup(render([empty]))


def test_labels_are_text_not_markup():
    evil = "<script>alert(1)</script>"
    page = render(
        [run("base"), run("sp", label=evil, model=f'"{evil}', sentence=f"{evil} & holds")], title=evil
    )
    Markup(page)
    assert "<script" not in page
    assert "&lt;script&gt;" in page


@pytest.mark.parametrize("label", ["$x_1$ & co", "_hidden", "a\nb", "x" * 200, "", None, "状态"])
@pytest.mark.filterwarnings("ignore:Glyph")
def test_odd_labels(label):
    Markup(render([run("base"), run("sp", label=label)]))


def test_runs_survive_json():
    pair = runs("base", "fitted noise")
    assert render(json.loads(json.dumps(pair))) == render(pair)


def test_different_tokens_compare_in_bits_per_byte():
    page = render([run("base"), run("sp", bytes_per_token=4.2)])
    assert "Bits per byte by position" in headings(page)
    assert "Mean loss in bits per byte" in page


def test_different_training_lengths():
    Markup(render([run("base"), run("longer", train_length=512)]))


def test_many_layers():
    Markup(render([run("base", layers=48, heads=24)]))


@pytest.mark.parametrize("nothing", [[], {}, [1]])
def test_no_runs_is_said_clearly(nothing):
    with pytest.raises(LongrollError, match="run"):
        render(nothing)


def test_write_report_replaces_whole(tmp_path, page):
    path = tmp_path / "new" / "report.html"
    assert write_report(runs("base", "state passing"), path) == path
    write_report(runs("base", "state passing"), path)
    assert path.read_text("utf-8") == page
    assert [p.name for p in path.parent.iterdir()] == ["report.html"]
    assert path.stat().st_mode & 0o444


def test_unwritable_path_is_said_clearly(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(LongrollError, match=r"Cannot write .*report\.html"):
        write_report([run("base")], tmp_path / "file" / "report.html")
    (tmp_path / "folder").mkdir()
    with pytest.raises(LongrollError, match="Cannot write"):
        write_report([run("base")], tmp_path / "folder")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "folder"]  # no temporary file is left


def bare(label, *, sequences=4, fingerprint="a", level=1.4, **changes):
    """A run of a verdict, levels and the losses of its texts, each a little apart."""
    rows = [level + 0.3 * i for i in range(sequences)]
    mean = sum(rows) / sequences
    return {
        "label": label, "verdict": "healthy", "sentence": "Holds to 8k: the loss stays at its level.",
        "train_length": 128, "max_position": 8192, "sequences": sequences,
        "levels": {"in_range": mean, "far": mean}, **changes,
        "texts": {"fingerprint": fingerprint, "in_range": rows, "far": rows},
    }  # fmt: skip


def text_of(page):
    return " ".join(re.sub(r"<[^>]+>", " ", page).split())


def test_prices_of_repairs_are_named_against_base_and_control():
    text = text_of(render([bare("base"), bare("sp", level=1.95), bare("none", level=1.42)]))
    assert "Costs 0.55 nats in range against base (0.55 to 0.55), costs 0.53 nats" in text
    assert "in range against none (0.53 to 0.53)" in text
    assert "Costs 0.020 nats in range against base" in text  # the control's own
    same = text_of(render([bare("base"), bare("sp")]))
    assert "No cost in range shows against base (0.000 to 0.000)" in same


def test_a_price_in_the_sentence_is_not_said_twice():
    price = {"mean": 0.5, "low": 0.4, "high": 0.6, "paired": True}
    comparisons = {"against": {"label": "base", "in_range": price, "far": None}}
    told = bare("sp", sentence="Holds to 8k; costs 0.50 nats in range.", comparisons=comparisons)
    assert "against base" not in text_of(render([bare("base"), told]))


def test_runs_measured_otherwise_are_marked():
    text = text_of(render([bare("base"), bare("sp", sequences=16), bare("tbptt", fingerprint="b")]))
    assert "sp was measured on 16 texts, base on 4 texts." in text
    assert "tbptt was measured on other texts than base." in text
    other = bare("sp", max_position=4096, provenance={"dtype": "float16"})
    text = text_of(render([bare("base", provenance={"dtype": "float32"}), other]))
    assert "sp was measured to position 4096, base to position 8192." in text
    assert "sp was measured in float16, base in float32." in text
    assert "was measured" not in text_of(render([bare("base"), bare("sp")]))
