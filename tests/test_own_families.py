"""Families that longroll does not bring: registered, named by a package, or by code beside a checkpoint."""

import json
import sys

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, Mamba2Config, Mamba2ForCausalLM

import longroll
from longroll import Family, LongrollError
from longroll.families import FAMILIES, register_packages

CONFIG = {
    "vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 1, "state_size": 8,
    "num_heads": 2, "head_dim": 16, "n_groups": 1,
}  # fmt: skip


class OtherConfig(Mamba2Config):
    model_type = "other_mamba2"


class OtherForCausalLM(Mamba2ForCausalLM):
    config_class = OtherConfig


AutoConfig.register("other_mamba2", OtherConfig)
AutoModelForCausalLM.register(OtherConfig, OtherForCausalLM)


@pytest.fixture
def checkpoint(tmp_path):
    """A folder of an architecture that longroll does not know; what a test registers is forgotten."""
    known = dict(FAMILIES)
    torch.manual_seed(0)
    OtherForCausalLM(OtherConfig(**CONFIG)).save_pretrained(tmp_path / "model")
    yield tmp_path / "model"
    FAMILIES.clear()
    FAMILIES.update(known)


def test_a_registered_family_opens(checkpoint):
    with pytest.raises(LongrollError, match="'other_mamba2' is not one longroll can open yet"):
        longroll.load(checkpoint)
    longroll.register_family("other_mamba2", Family("mamba2", "cache_params"))
    lm = longroll.load(checkpoint)
    assert lm.own and [layer.kind for layer in lm.layers] == ["mamba2"]
    assert not longroll.load("specimen").own


@pytest.mark.parametrize(("argument", "model_type", "words"), [
    ("mamba2", "other_mamba2", "takes a longroll.Family, not 'mamba2'"),
    (Family("gla"), "gla", "is a built-in family"),
    (Family("mamba2"), "mamba2", "is a built-in family"),
])  # fmt: skip
def test_what_is_no_family_is_refused(argument, model_type, words):
    with pytest.raises(LongrollError, match=words):
        longroll.register_family(model_type, argument)


class Stuck(Family):
    """Starts every forward from zero."""

    def cache(self, model, input_ids, state):
        return super().cache(model, input_ids, None)


class Cut(Family):
    """Detaches what it returns."""

    def run(self, *args, **kwargs):
        output, final = super().run(*args, **kwargs)
        return output, final.detach()


class Deaf(Family):
    """Detaches what it is given."""

    def cache(self, model, input_ids, state):
        return super().cache(model, input_ids, state and state.detach())


class Writes(Family):
    """Writes into what it is given."""

    def cache(self, model, input_ids, state):
        for tensor in (state or {}).values():
            tensor.mul_(0.5)
        return super().cache(model, input_ids, state)


@pytest.mark.parametrize(
    ("family", "words"),
    [
        (Stuck, "state: a chunked forward differs from the full one"),
        (Cut, "recurrent state: the final state is detached"),
        (Deaf, "state: the gradient does not reach the initial state"),
        (Writes, "state: the forward writes in place into the state"),
    ],
)
def test_the_self_check_runs(checkpoint, family, words):
    longroll.register_family("other_mamba2", family("mamba2", "cache_params"))
    with pytest.raises(LongrollError, match=words):
        longroll.load(checkpoint)


def package(place, name, code, entry):
    """Install a package: its code, and the metadata that name an entry point."""
    (place / f"{name}.py").write_text(code)
    info = place / f"{name}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[longroll.families]\n{entry}\n")


@pytest.mark.parametrize("how", ["family", "module"])
def test_a_package_brings_its_own(checkpoint, tmp_path, monkeypatch, how):
    monkeypatch.syspath_prepend(tmp_path)
    code = "import longroll\nFAMILY = longroll.Family('mamba2', 'cache_params')\n"
    entry = "other_mamba2 = brings_family:FAMILY"
    if how == "module":
        code += "longroll.register_family('other_mamba2', FAMILY)\n"
        entry = "other_mamba2 = brings_family"
    monkeypatch.delitem(sys.modules, "brings_family", raising=False)
    package(tmp_path, "brings_family", code, entry)
    assert longroll.load(checkpoint).own


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("import no_such_thing", "ModuleNotFoundError: No module named 'no_such_thing'"),
        ("raise ValueError('two\\nlines')", "ValueError: two"),
        ("FAMILY = 3", "is not a longroll.Family and registers none"),
        ("", "AttributeError"),
    ],
)
def test_a_broken_package_is_named_and_harms_nothing_else(checkpoint, tmp_path, monkeypatch, code, said):
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "broken_family", raising=False)
    package(tmp_path, "broken_family", code, "other_mamba2 = broken_family:FAMILY")
    assert longroll.load("specimen").layers
    with pytest.raises(LongrollError, match="unheard_of"):
        longroll.families.family_of("unheard_of")
    with pytest.raises(LongrollError, match="The package broken_family ") as caught:
        longroll.load(checkpoint)
    assert register_packages() == [str(caught.value)]
    assert said in str(caught.value) and "\n" not in str(caught.value)


CODE = """
import longroll
from transformers import Mamba2Config, Mamba2ForCausalLM
class RemoteConfig(Mamba2Config):
    model_type = "remote_mamba2"
class RemoteForCausalLM(Mamba2ForCausalLM):
    config_class = RemoteConfig
longroll.register_family("remote_mamba2", longroll.Family("mamba2", "cache_params"))
"""


def test_remote_code_registers_before_the_model_type_is_judged(checkpoint, tmp_path, monkeypatch):
    from transformers import dynamic_module_utils

    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    (checkpoint / "remote_mamba2.py").write_text(CODE)
    config = json.loads((checkpoint / "config.json").read_text())
    config["model_type"] = "remote_mamba2"
    classes = {"AutoConfig": "RemoteConfig", "AutoModelForCausalLM": "RemoteForCausalLM"}
    config["auto_map"] = {auto: f"remote_mamba2.{name}" for auto, name in classes.items()}
    (checkpoint / "config.json").write_text(json.dumps(config))
    with pytest.raises(LongrollError, match="'remote_mamba2' comes with its own code"):
        longroll.load(checkpoint)
    lm = longroll.load(checkpoint, trust_remote_code=True)
    assert type(lm.model).__name__ == "RemoteForCausalLM" and lm.own
    (checkpoint / "remote_mamba2.py").write_text("import longroll\nraise KeyError('x')")
    with pytest.raises(LongrollError, match="its code cannot be loaded"):
        longroll.load(checkpoint, trust_remote_code=True)
