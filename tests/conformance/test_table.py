"""The table of families: complete, true to the docs, and honest about a family that fails."""

from pathlib import Path

import pytest

from longroll.cli._doctor import doctor, write_markdown
from longroll.conformance import table
from longroll.conformance.tiny import ON_GPU
from longroll.errors import LongrollError
from longroll.families import FAMILIES, family_of
from longroll.families._cache import StateCache
from zoo import EVERY

DOCS = Path(__file__).parents[2] / "docs" / "families.md"
TRIED = {model_type for model_type, _ in (EVERY | ON_GPU).values()}


def test_every_family_has_a_model_to_try_the_laws_on():
    assert {name for name in FAMILIES if name not in TRIED and f"{name}_text" not in TRIED} == set()


def test_the_docs_have_every_family_and_what_computes_it():
    lines = DOCS.read_text().split("<!-- families -->")[1].split("<!-- /families -->")[0].splitlines()
    rows = {cells[0]: cells for line in lines[3:] if (cells := line.strip("| ").split(" | "))}
    assert rows.keys() == TRIED
    for model_type, cells in rows.items():
        family = family_of(model_type)
        assert [cells[1], cells[5], cells[6].removesuffix(" *").split(";")[0], cells[7]] == [
            family.kind,
            *table.paths(family),
            family.reference,
        ]
        assert not any(cell.startswith(("NO", "not ")) for cell in cells)


def test_a_row_says_what_the_laws_said():
    bamba, llama = table.tabulate(["bamba", "llama"])
    assert (bamba["family"], bamba["kind"], bamba["loads"]) == ("bamba", "mamba2", "yes")
    assert bamba["state"].startswith("to 1e-0") and bamba["gradient"].startswith("to 1e-0")
    assert 0 < bamba["state_gap"]["size"] < 2e-5
    assert not bamba["gpu_tried"] and table.cells(bamba)[6].endswith(" *")
    assert "gradient" not in llama and table.cells(llama)[4] == "-"


def test_a_family_that_fails_says_so_and_hides_no_other(monkeypatch):
    def forgetful(self, layer_idx, state_idx=0):
        return None

    monkeypatch.setattr(StateCache, "get_recurrent_state", forgetful)
    broken, sound = table.tabulate(["qwen3_5_text", "lfm2"])
    assert broken["loads"] == broken["state"] == broken["gradient"] == "NO"
    loads, state, gradient = broken["problems"]
    assert loads.startswith("qwen3_5_text: loads: LongrollError") and "self-check" in loads
    assert state.startswith("qwen3_5_text: state: ") and "off by" in state
    assert gradient.startswith("qwen3_5_text: gradient: no gradient into ['0.recurrent.0'")
    assert sound["loads"] == "yes" and sound["gradient"].startswith("to 1e-0") and not sound["problems"]


def test_the_table_takes_its_own_place_in_a_file(tmp_path):
    rows = table.tabulate(["lfm2"])
    file = tmp_path / "families.md"
    file.write_text("before\n<!-- families -->\nold\n<!-- /families -->\nafter\n")
    for _ in range(2):
        write_markdown(file, rows)
        lines = file.read_text().splitlines()
        assert lines[0] == "before" and lines[-1] == "after" and "old" not in lines
        assert lines[4].startswith("| lfm2 | conv | yes |")
    file.unlink()
    write_markdown(file, rows)
    assert file.read_text().splitlines()[3].startswith("| lfm2 | conv | yes |")


def test_markdown_needs_the_table(tmp_path):
    with pytest.raises(LongrollError, match="--families"):
        doctor(markdown=tmp_path / "families.md")
