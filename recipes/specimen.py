"""Make the specimen: a byte-level Mamba-2 of 0.39M parameters that breaks past the 128 bytes it trained on.

Large models break because they overfit to the states of their training length. A small one does so within a
minute if some of its heads can hardly forget: the first half of the heads of each layer gets decay rates A
drawn from [.001, .1] instead of Mamba-2's [1, 16], and A is kept fixed. If A is trained too, it grows until
the model forgets in time, and nothing breaks.

    python recipes/specimen.py --text stdlib --text SITE_PACKAGES --output specimen

Python files are divided into train and validation by name, as everywhere in longroll; only train is read.
"""

import argparse
import math
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from transformers import Mamba2Config, Mamba2ForCausalLM, PreTrainedModel

from longroll import RecurrentLM
from longroll.data import Corpus, read_documents
from longroll.data._split import side_of

LENGTH = 128
SLOW, ORDINARY = (0.001, 0.1), (1.0, 16.0)


def build(seed: int) -> Mamba2ForCausalLM:
    """A fresh model with half of the heads of each layer slow to forget."""
    torch.manual_seed(seed)
    config = Mamba2Config(
        vocab_size=256,
        hidden_size=128,
        num_hidden_layers=3,
        state_size=64,
        head_dim=64,
        num_heads=4,
        expand=2,
        n_groups=1,
        chunk_size=LENGTH,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    config.train_length = LENGTH
    model = Mamba2ForCausalLM(config)
    random = np.random.default_rng(seed)
    for name, weight in model.named_parameters():
        if name.endswith("A_log"):
            heads = len(weight)
            rates = [random.uniform(*(SLOW if head < heads // 2 else ORDINARY)) for head in range(heads)]
            weight.data.copy_(torch.tensor(rates).log())
            weight.requires_grad_(False)
    return model


def read_text(sources: list[str]) -> Corpus:
    """The train side of the Python files of folders and of the standard library, each text once, shuffled."""
    texts = sorted({text for source in sources for text in _documents(source)})
    order = np.random.default_rng(0).permutation(len(texts))
    return Corpus.from_texts(texts[i] for i in order)


def _documents(source: str) -> Iterator[str]:
    if not Path(source).is_dir():
        yield from read_documents(source, split="train")
        return
    for path in Path(source).rglob("*.py"):
        if side_of(path.name) == "train" and path.is_file():
            yield path.read_text(encoding="utf-8", errors="replace")


def train(model: PreTrainedModel, ids: torch.Tensor, options: argparse.Namespace) -> None:
    """AdamW on random windows, from the zero state, with a cosine to 0."""
    weights = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in weights if p.ndim > 1], "weight_decay": 0.1},
        {"params": [p for p in weights if p.ndim == 1], "weight_decay": 0.0},
    ]
    cuda = options.device.startswith("cuda")
    optimizer = torch.optim.AdamW(groups, lr=options.learning_rate, betas=(0.9, 0.95), fused=cuda)
    warmup = min(200, options.steps // 10 + 1)

    def rate(step: int) -> float:
        return min(1, (step + 1) / warmup) * 0.5 * (1 + math.cos(math.pi * step / options.steps))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    # on a CPU longroll's ops are the faster path
    forward = torch.compile(model) if cuda else RecurrentLM(model)
    generator = torch.Generator().manual_seed(options.seed)
    window = torch.arange(LENGTH + 1, device=options.device)
    began = time.perf_counter()
    for step in range(1, options.steps + 1):
        starts = torch.randint(len(ids) - LENGTH, (options.batch, 1), generator=generator)
        batch = ids[starts.to(options.device) + window].long()
        with torch.autocast(options.device.split(":")[0], torch.bfloat16, enabled=cuda):
            inputs = batch[:, :-1]
            logits = forward(input_ids=inputs, use_cache=False).logits if cuda else forward(inputs)[0]
        loss = F.cross_entropy(logits.float().flatten(0, 1), batch[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        schedule.step()
        if step % max(1, options.steps // 20) == 0:
            print(f"step {step}: loss {loss.item():.3f}, {time.perf_counter() - began:.0f} s", flush=True)


def main() -> None:
    """Read the text, train, save an HF checkpoint."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--text", action="append", help='"stdlib", a folder of Python files; several times')
    parser.add_argument("--steps", type=int, default=6000)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--learning-rate", type=float, default=4e-3)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("specimen"))
    options = parser.parse_args()
    corpus = read_text(options.text or ["stdlib"])
    print(f"{corpus.tokens / 1e6:.0f} MB of {corpus.documents} files", flush=True)
    ids = torch.from_numpy(corpus.ids.astype(np.uint8)).to(options.device)
    model = build(options.seed).to(options.device)
    train(model.train(), ids, options)
    model.eval().save_pretrained(options.output)


if __name__ == "__main__":
    main()
