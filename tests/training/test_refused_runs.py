"""A run that is refused leaves its output as it was found, and the next correct one needs no `resume`."""

import json
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from ranked import corpus_of
from transformers import TrainerCallback

from longroll import LongrollError, RecurrentLM
from longroll.conformance.tiny import build
from longroll.training import PosttrainOptions, checkpoints, posttrain
from longroll.training.faults import full_disk_is_said
from longroll.training.saving import save_checkpoint

OPTIONS = {"length": 8, "steps": 2, "batch_size": 2, "learning_rate": 1e-3}
LATE = "refused late"


class Refuses(TrainerCallback):
    """Ends a run as it begins, after all checks."""

    def on_train_begin(self, *_, **__):
        raise LongrollError(LATE)


def seen(folder):
    """Return all that lies below a folder, with its contents, but locks, which bind no longer."""
    paths = [path for path in folder.rglob("*") if path.name != ".lock"]
    return {path.relative_to(folder): path.read_bytes() if path.is_file() else None for path in paths}


def run(output, family="mamba2", intervention="sp", **options):
    more = {name: options.pop(name) for name in ("callbacks", "resume") if name in options}
    lm = RecurrentLM(build(family))
    return posttrain(
        lm, corpus_of(), intervention, PosttrainOptions(**OPTIONS | options), output, force=True, **more
    )


REFUSED = {
    "nothing to train": ({"family": "retnet", "trainable": "decays"}, "`trainable` decays"),
    "convolutions": ({"family": "lfm2", "trainable": "decays"}, "no recurrent state"),
    "no decays": ({"family": "retnet", "decay_speed": 3.0}, "`decay_speed`"),
    "adapters": ({"lora_rank": 2, "decay_speed": 3.0}, "`decay_speed`"),
    "no state": ({"family": "llama"}, "llama has no recurrent state"),
    "graphs": ({"cuda_graphs": True}, "CUDA graph"),
    "text": ({"intervention": "tbptt", "batch_size": 999}, "give more text"),
    "late": ({"callbacks": [Refuses()]}, LATE),
}


@pytest.mark.parametrize("what", REFUSED)
@pytest.mark.parametrize("place", ["absent", "nested/absent", "empty", "mine", "killed early"])
def test_what_is_refused_leaves_the_output_as_it_was(what, place, tmp_path):
    (tmp_path / "empty").mkdir()
    for folder, name in (("mine", "notes.txt"), ("killed early/checkpoints", "run.json")):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / name).write_text("")
    before = seen(tmp_path)
    arguments, said = REFUSED[what]
    with pytest.raises(LongrollError, match=said):
        run(tmp_path / place, **arguments)
    after = seen(tmp_path)
    for found in (before, after):
        found.pop(Path("killed early/checkpoints/run.json"), None)  # which binds nobody
    assert after == before


@pytest.mark.parametrize("killed", [False, True])
def test_the_next_correct_run_needs_no_resume(killed, tmp_path):
    """After a refusal, and after a run that was killed before its first checkpoint."""
    if killed:
        (tmp_path / "out/checkpoints").mkdir(parents=True)
        (tmp_path / "out/checkpoints/run.json").write_text("{}")
    else:
        with pytest.raises(LongrollError, match=LATE):
            run(tmp_path / "out", callbacks=[Refuses()])
    assert run(tmp_path / "out", resume=killed)[-1]["step"] == 2
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "README.md", "config.json", "generation_config.json", "model.safetensors",
    ]  # fmt: skip


def test_an_interrupted_run_stays_when_another_command_is_refused(tmp_path):
    class Fails(TrainerCallback):
        def on_save(self, *_, **__):
            raise LongrollError(LATE)

    with pytest.raises(LongrollError, match=LATE):
        run(tmp_path, callbacks=[Fails()], save_steps=1)
    before = seen(tmp_path)
    assert checkpoints.newest_whole(tmp_path / "checkpoints")
    with pytest.raises(LongrollError, match="`decay_speed`"):
        run(tmp_path, family="retnet", decay_speed=3.0)
    with pytest.raises(LongrollError, match="interrupted run"):
        run(tmp_path)
    with pytest.raises(LongrollError, match="another model"):
        run(tmp_path, family="retnet", resume=True)
    assert seen(tmp_path) == before
    assert run(tmp_path, resume=True, save_steps=1)[-1]["step"] == 2


HOLDS = """
import sys, pathlib
from longroll.files import Lock
folder = pathlib.Path(sys.argv[1])
(folder / "run.json").write_text("of the other")
lock = Lock(folder)
lock.take()
print(1, flush=True)
sys.stdin.read()
"""


def test_a_run_that_another_process_outran_takes_nothing_from_it(tmp_path):
    others = []

    class Meanwhile(TrainerCallback):
        """Has another process take the folder after the checks."""

        def on_init_end(self, args, *_, **__):
            command = [sys.executable, "-c", HOLDS, args.output_dir]
            others.append(subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE))
            others[0].stdout.readline()

    with pytest.raises(LongrollError, match="in use by process"):
        run(tmp_path, callbacks=[Meanwhile()])
    folder = tmp_path / "checkpoints"
    assert (folder / "run.json").read_text() == "of the other"
    assert f"process {others[0].pid} " in (folder / ".lock").read_text()
    others[0].communicate()


def test_what_no_run_wrote_is_not_removed(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints/best.pt").write_text("mine")
    before = seen(tmp_path)
    for resume in (False, True):
        with pytest.raises(LongrollError, match=r"holds best\.pt.*name another folder"):
            run(tmp_path, resume=resume)
    assert seen(tmp_path) == before


@pytest.mark.parametrize("options", [{"lora_rank": 2}, {"trainable": "decays"}, {}], ids=str)
@pytest.mark.parametrize("ends", ["early", "done"])
def test_a_run_gives_the_model_back_trainable_and_without_adapters(ends, options, tmp_path):
    """As in a notebook, where the next cell trains the same model."""
    lm = RecurrentLM(build("mamba2"))
    names = [name for name, _ in lm.model.named_parameters()]
    given = PosttrainOptions(**OPTIONS | options)
    if ends == "early":
        with pytest.raises(LongrollError, match=LATE):
            posttrain(lm, corpus_of(), "sp", given, tmp_path / "one", force=True, callbacks=[Refuses()])
        before = build("mamba2").state_dict()
        assert all(torch.equal(t, before[name]) for name, t in lm.model.state_dict().items())
    else:
        posttrain(lm, corpus_of(), "sp", given, tmp_path / "one", force=True)
    assert [name for name, p in lm.model.named_parameters() if p.requires_grad] == names
    assert posttrain(lm, corpus_of(), "sp", given, tmp_path / "two", force=True)[-1]["step"] == 2


@pytest.mark.parametrize("size", [0, 4096, 40_000])
def test_a_result_that_the_disk_does_not_hold_leaves_nothing(size, tmp_path):
    model, before = build("mamba2"), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    output = tmp_path / "new/out"
    try:
        with pytest.raises(LongrollError, match=r"`output` .*new/out cannot be written to: .*File too large"):  # noqa: SIM117
            with full_disk_is_said(output), checkpoints.aside(output) as partial:
                save_checkpoint(model, partial)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not (tmp_path / "new").exists()


UNEVEN = """
import json, os, sys
from longroll import RecurrentLM, ranks
from longroll.conformance.tiny import build
from longroll.training import PosttrainOptions, posttrain
sys.path[:0] = sys.argv[3:]
from ranked import corpus_of

own = json.loads(sys.argv[2])[int(os.environ["RANK"])]
corpus = corpus_of(seed=own.pop("text", 0))
kind = own.pop("kind", "sp")
posttrain(RecurrentLM(build("mamba2")), corpus, kind, PosttrainOptions(**own), sys.argv[1], force=True)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "differs", [{"steps": 3}, {"batch_size": 1}, {"kind": "random"}, {"text": 1}], ids=str
)
def test_processes_that_were_started_to_do_something_else_are_refused(differs, tmp_path):
    (tmp_path / "run.py").write_text(UNEVEN)
    here = Path(__file__).parent
    told = [tmp_path / "out", json.dumps([OPTIONS, OPTIONS | differs]), here, here.parent]
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node=2",
        tmp_path / "run.py",
        *told,
    ]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=120)
    name = {"kind": "intervention"}.get(*differs, *differs)
    assert done.returncode and f"Rank 1 was started with `{name}` " in done.stderr, done.stderr
    assert not (tmp_path / "out").exists()
