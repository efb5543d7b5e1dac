"""A step replayed as one CUDA graph is the step; where there can be no graph, an error says so."""

import pytest
import torch
from test_trainer import corpus_of
from transformers import TrainingArguments

from longroll import InitialStateTrainer, LongrollError, StatePassing
from longroll.data import Windows
from longroll.training.graphs import StepGraph
from longroll.training.loss import next_token_loss
from zoo import VOCAB, assert_close, assert_same_state, lm_of, tokens

on_a_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def test_a_cpu_has_none():
    with pytest.raises(LongrollError, match="cuda_graphs"):
        StepGraph(lm_of("mamba"))


@pytest.mark.parametrize(
    ("router", "smoothing", "function", "checkpointing"),
    [(True, 0, None, False), (False, 0.1, None, False), (False, 0, print, False), (False, 0, None, True)],
)
def test_a_step_with_another_loss_or_checkpoints_has_none(
    router, smoothing, function, checkpointing, tmp_path
):
    lm = lm_of("mamba2")
    lm.model.config.output_router_logits = router
    arguments = TrainingArguments(
        str(tmp_path), use_cpu=True, label_smoothing_factor=smoothing, gradient_checkpointing=checkpointing
    )
    with pytest.raises(LongrollError, match="with gradient checkpointing" if checkpointing else "plain loss"):
        InitialStateTrainer(lm, arguments, compute_loss_func=function, cuda_graphs=True)


@on_a_gpu
def test_attention_has_none():
    lm = lm_of("llama").to("cuda")
    with pytest.raises(LongrollError, match="cuda_graphs"):
        StepGraph(lm)


@on_a_gpu
@pytest.mark.parametrize("name", ["mamba", "mamba2"])
def test_a_replay_is_the_step(name):
    """Losses, final states and gradients, summed over steps: from zero, from a state, from a part of one."""
    plain, graphed = (lm_of(name).to("cuda").train() for _ in range(2))
    graph = StepGraph(graphed)
    ids = [tokens(2, 13, seed=i).cuda() for i in range(4)]
    state = state_of_plain = None
    for i, batch in enumerate(ids):
        if i == 2:
            state, state_of_plain = state.part("recurrent"), state_of_plain.part("recurrent")
        loss, state = graph(batch[:, :-1], batch[:, 1:], state)
        logits, state_of_plain = plain(batch[:, :-1], state_of_plain)
        expected = next_token_loss(logits, batch[:, 1:])
        expected.backward()
        state_of_plain = state_of_plain.detach()
        assert_close(loss, expected, 1e-5)
        assert_same_state(state, state_of_plain, 1e-4)
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
def test_trainer_learns_the_same(tmp_path):
    def weights(graphs: bool) -> dict[str, torch.Tensor]:
        lm = lm_of("mamba2")
        arguments = TrainingArguments(
            output_dir=str(tmp_path / str(graphs)), max_steps=4, per_device_train_batch_size=2,
            gradient_accumulation_steps=2, learning_rate=1e-3, report_to=[], save_strategy="no",
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
