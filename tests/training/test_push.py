"""`--push-to-hub`: checked before the run; a push that fails leaves the saved folder as it is."""

import pytest
from huggingface_hub import RepoUrl
from typer.testing import CliRunner

import longroll
from longroll import LongrollError
from longroll.cli import app
from longroll.training.hub import check_push, push
from zoo import build


@pytest.fixture
def hub(monkeypatch):
    """A machine with a token and a hub; gives what was asked of the hub."""
    asked = []

    class Api:
        def create_repo(self, repo_id, **options):
            asked.append(("create", repo_id, options))
            return RepoUrl(f"https://hub.test/me/{repo_id}", endpoint="https://hub.test")

        def upload_folder(self, *, repo_id, folder_path, commit_message):
            asked.append(("upload", repo_id, sorted(p.name for p in folder_path.iterdir())))

    monkeypatch.setattr("huggingface_hub.HfApi", Api)
    monkeypatch.setattr("huggingface_hub.get_token", lambda: "hf_token")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    return asked


def posttrain(folder, *more):
    command = f"posttrain {folder / 'in'} --text {folder / 'text'} --train-length 8 --steps 2 --batch-size 2"
    arguments = [*command.split(), "--output", str(folder / "out"), "--device", "cpu", *more]
    ran = CliRunner().invoke(app, arguments)
    return ran, " ".join(f"{ran.output} {ran.exception}".split())


@pytest.fixture
def model(tmp_path):
    build("mamba2", vocab_size=256).save_pretrained(tmp_path / "in")
    (tmp_path / "text").mkdir()
    for i in range(30):
        (tmp_path / "text" / f"{i}.txt").write_text(f"{i} to be or not to be " * 9)
    return tmp_path


def test_the_folder_is_uploaded_when_it_is_whole(hub, model):
    ran, said = posttrain(model, "--push-to-hub", "repaired")
    assert ran.exit_code == 0, said
    assert "https://hub.test/me/repaired" in said
    saved = ["README.md", "config.json", "generation_config.json", "model.safetensors"]
    assert hub == [("create", "repaired", {"exist_ok": True}), ("upload", "me/repaired", saved)]


def test_without_network_the_folder_stays(hub, model, monkeypatch):
    def fail(*_, **__):
        raise ConnectionError("[Errno -2] Name or service\nnot known")

    monkeypatch.setattr("huggingface_hub.HfApi.create_repo", fail)
    ran, said = posttrain(model, "--push-to-hub", "me/repaired")
    assert isinstance(ran.exception, LongrollError)
    assert "--push-to-hub me/repaired: ConnectionError: [Errno -2] Name or service not known." in said
    assert f"hf upload me/repaired {model / 'out'}" in said
    assert (model / "out" / "model.safetensors").is_file() and not (model / "out" / "checkpoints").exists()
    assert longroll.load(model / "out", device="cpu").train_length == 8


@pytest.mark.parametrize("name", ["", "a/b/c", "white space", "double--dash", "../up", "name.git"])
def test_a_name_that_the_hub_does_not_allow_is_refused(name, hub, tmp_path):
    with pytest.raises(LongrollError, match="no name of a repository"):
        check_push(name, tmp_path)
    assert hub == []


def test_a_push_that_cannot_be_is_refused_before_the_model_is_read(hub, tmp_path, monkeypatch):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "diary.txt").touch()
    _, said = posttrain(tmp_path, "--push-to-hub", "me/repaired")
    assert "--push-to-hub uploads all of --output" in said and "diary.txt" in said
    check_push("me/repaired", tmp_path / "out", resume=True)
    (tmp_path / "out" / "diary.txt").unlink()
    check_push("me/repaired", tmp_path / "out")
    with monkeypatch.context() as without:
        without.setattr("huggingface_hub.get_token", lambda: None)
        assert "--push-to-hub: this machine has no token" in posttrain(tmp_path, "--push-to-hub", "me/it")[1]
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert "--push-to-hub: HF_HUB_OFFLINE" in posttrain(tmp_path, "--push-to-hub", "me/it")[1]
    assert hub == []


def test_no_network_at_all(tmp_path, monkeypatch):
    """The hub's own client, to an address where nothing listens."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.hf_api.constants.ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(LongrollError, match=r"`push_to_hub` me/it: .*hf upload me/it"):
        push(tmp_path, "me/it")
