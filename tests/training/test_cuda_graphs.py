"""A step replayed as one CUDA graph is the step; where there can be no graph, an error says so."""

import pytest
import torch
from test_trainer import corpus_of
from transformers import TrainingArguments

from longroll import InitialStateTrainer, LongrollError, StatePassing
from longroll.data import Windows
from longroll.training.graphs import StepGraph
from longroll.training.loss import next_token_loss
from zoo import VOCAB, assert_close, assert_same_state, build, lm_of, tokens

on_a_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def test_a_cpu_has_none():
    with pytest.raises(LongrollError, match="cuda_graphs"):
        StepGraph(lm_of("mamba"))


@pytest.mark.parametrize(
    ("router", "smoothing", "function", "dropout"),
    [(True, 0, None, 0.0), (False, 0.1, None, 0.0), (False, 0, print, 0.0), (False, 0, None, 0.1)],
)
def test_a_step_with_another_loss_or_random_checkpoints_has_none(
    router, smoothing, function, dropout, tmp_path
):
    model = build("bamba", attention_dropout=dropout)
    model.config.output_router_logits = router
    arguments = TrainingArguments(
        str(tmp_path), use_cpu=True, label_smoothing_factor=smoothing, gradient_checkpointing=bool(dropout)
    )
    with pytest.raises(LongrollError, match="has dropout" if dropout else "plain loss"):
        InitialStateTrainer(model, arguments, compute_loss_func=function, cuda_graphs=True)
    InitialStateTrainer(model, arguments, compute_loss_func=function, cuda_graphs=None)


def test_by_default_there_is_none_on_a_cpu(tmp_path):
    arguments = TrainingArguments(str(tmp_path), use_cpu=True)
    assert InitialStateTrainer(build("mamba2"), arguments, cuda_graphs=None)._graph is None


@on_a_gpu
@pytest.mark.parametrize("name", ["mamba", "mamba2", "bamba", "llama"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_by_default_graphs_are_for_what_is_known(name, checkpointing, tmp_path, caplog):
    arguments = TrainingArguments(str(tmp_path), gradient_checkpointing=checkpointing)
    arguments._n_gpu = 1  # of several
    trainer = InitialStateTrainer(build(name), arguments, cuda_graphs=None)
    known = name in ("mamba", "mamba2") and not checkpointing
    assert (trainer._graph is not None) == known
    assert ("one CUDA graph" in caplog.text) == known


@on_a_gpu
def test_a_step_that_waits_for_the_gpu_has_none():
    lm = lm_of("qwen3_next").to("cuda").train()
    lm.model.set_experts_implementation("eager")  # which asks which experts were hit
    batch = tokens(2, 13).cuda()
    with pytest.raises(LongrollError, match="leave out `cuda_graphs`"):
        StepGraph(lm)(batch[:, :-1], batch[:, 1:])


@on_a_gpu
@pytest.mark.parametrize("name", ["mamba", "mamba2", "bamba", "falcon_h1", "nemotron_h", "zamba2", "llama"])
def test_a_replay_is_the_step(name):
    """Losses, final states and gradients, summed over steps: from zero, from a state, from a part of one."""
    plain, graphed = (lm_of(name).to("cuda").train() for _ in range(2))
    graph = StepGraph(graphed)
    ids = [tokens(2, 13, seed=i).cuda() for i in range(4)]
    state = state_of_plain = None
    for i, batch in enumerate(ids):
        if i > 0:  # as interventions give it: without keys and values
            kept = ("recurrent",) if i == 2 else ("recurrent", "conv")
            state, state_of_plain = state.part(*kept), state_of_plain.part(*kept)
        loss, state = graph(batch[:, :-1], batch[:, 1:], state)
        logits, state_of_plain = plain(batch[:, :-1], state_of_plain)
        expected = next_token_loss(logits, batch[:, 1:])
        expected.backward()
        state_of_plain = state_of_plain.detach()
        assert_close(loss, expected, 1e-5)
        attends = any(key.part == "attention" for key in state_of_plain)
        assert state.seen == (0 if attends else state_of_plain.seen)
        assert_same_state(*(s.part("recurrent", "conv") for s in (state, state_of_plain)), 1e-4)
    gradients = {key: p.grad for key, p in graphed.named_parameters()}
    for key, parameter in plain.named_parameters():
        assert_close(gradients[key], parameter.grad, 1e-3, key)


@on_a_gpu
def test_steps_without_states_are_those_from_zero():
    plain, graphed = (lm_of("mamba2").to("cuda").train() for _ in range(2))
    graph = StepGraph(graphed, states=False)
    for seed in range(2):
        batch = tokens(2, 13, seed=seed).cuda()
        loss, state = graph(batch[:, :-1], batch[:, 1:])
        expected = next_token_loss(plain(batch[:, :-1])[0], batch[:, 1:])
        assert_close(loss, expected, 1e-5)
        assert not state and state.seen == 12
    with pytest.raises(LongrollError, match="without states"):
        graph(batch[:, :-1], batch[:, 1:], plain.zero_state(2))


@on_a_gpu
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", ["mamba2", "mamba", "bamba"])
def test_trainer_learns_the_same(name, checkpointing, tmp_path):
    def weights(graphs: bool) -> dict[str, torch.Tensor]:
        lm = lm_of(name)
        arguments = TrainingArguments(
            output_dir=str(tmp_path / str(graphs)), max_steps=4, per_device_train_batch_size=2,
            gradient_accumulation_steps=2, learning_rate=1e-3, report_to=[], save_strategy="no",
            gradient_checkpointing=checkpointing,
        )  # fmt: skip
        arguments._n_gpu = 1  # of several
        data = Windows(corpus_of(vocab=VOCAB), 8, num_items=16)
        trainer = InitialStateTrainer(
            lm, arguments, intervention=StatePassing(), cuda_graphs=graphs, train_dataset=data
        )
        trainer.train()
        return {key: p.detach().cpu() for key, p in lm.model.named_parameters()}

    plain, graphed = weights(False), weights(True)
    for key, expected in plain.items():
        assert_close(graphed[key], expected, 1e-3, key)


@on_a_gpu
def test_a_run_goes_on_where_a_graph_by_default_cannot_be_captured(tmp_path):
    lm, batch = lm_of("mamba2").to("cuda").train(), tokens(2, 13).cuda()
    alive = next_token_loss(lm(batch[:, :-1])[0], batch[:, 1:])  # ties the parameters to the default stream
    before = [p.detach().clone() for p in lm.parameters()]
    arguments = TrainingArguments(
        output_dir=str(tmp_path), max_steps=2, per_device_train_batch_size=2, learning_rate=1e-2,
        report_to=[], save_strategy="no",
    )  # fmt: skip
    arguments._n_gpu = 1  # of several
    data = Windows(corpus_of(vocab=VOCAB), 8, num_items=4)
    trainer = InitialStateTrainer(
        lm, arguments, intervention=StatePassing(), cuda_graphs=None, train_dataset=data
    )
    trainer.train()
    assert alive.grad_fn is not None and trainer.state.global_step == 2
    assert any(not torch.equal(p, q) for p, q in zip(lm.parameters(), before, strict=True))
