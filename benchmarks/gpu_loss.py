"""The loss of training on a GPU, from last hidden states to their gradients and the head's: time and memory.

    python benchmarks/gpu_loss.py --json gpu_loss.json
    python benchmarks/gpu_loss.py --device cpu --shapes 64x64x256       # checks the script

Peers: PyTorch's cross-entropy of float32 logits, which is what a Trainer does under autocast, and the losses
of fla and Liger-Kernel that fuse it with the head. bf16 by autocast from float32 weights; `whole` keeps
longroll's loss from taking logits to pieces. The error is that of the gradient of the hidden states, root
mean square against float32. Medians.
"""

import argparse
import importlib.util
import statistics
import time
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

import longroll
from longroll.conformance.tiny import from_config
from longroll.results import BenchmarkResult, provenance
from longroll.training import loss as losses

SHAPES = ["8192x1024x50288", "32768x1024x50288", "8192x2048x128256", "32768x2048x128256"]
Loss = Callable[[Tensor, Tensor], Tensor]


def ways(weight: Tensor, lm: longroll.RecurrentLM) -> Iterator[tuple[str, Loss]]:
    """Names and losses of hidden states (1, T, D) and targets (1, T)."""

    def pytorch(hidden: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(F.linear(hidden, weight).float().flatten(0, 1), targets.flatten())

    def whole(hidden: Tensor, targets: Tensor) -> Tensor:
        usual, losses._LOGITS = losses._LOGITS, 1 << 60
        try:
            return losses.hidden_loss(lm, hidden, targets)
        finally:
            losses._LOGITS = usual

    yield "pytorch", pytorch
    if weight.is_cuda and importlib.util.find_spec("fla"):
        from fla.modules import FusedLinearCrossEntropyLoss

        theirs = FusedLinearCrossEntropyLoss()
        yield "fla", lambda hidden, targets: theirs(hidden, targets, weight.to(hidden.dtype))
    if weight.is_cuda and importlib.util.find_spec("liger_kernel"):
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

        liger = LigerFusedLinearCrossEntropyLoss(accum_dtype=torch.float32)
        yield (
            "liger",
            lambda hidden, targets: liger(weight.to(hidden.dtype), hidden.flatten(0, 1), targets.flatten()),
        )
    yield "longroll, whole", whole
    yield "longroll", lambda hidden, targets: losses.hidden_loss(lm, hidden, targets)


def measure(step: Callable[[], object], leaves: list[Tensor], device: str) -> dict:
    """Median milliseconds of a step and its peak memory above what is there, gradients counted."""
    seconds = []
    for i in range(12):
        for leaf in leaves:
            leaf.grad = None
        if device == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        began = time.perf_counter()
        step()
        if device == "cuda":
            torch.cuda.synchronize()
        if i > 1:
            seconds.append(time.perf_counter() - began)
    peak = torch.cuda.max_memory_allocated() - before if device == "cuda" else 0
    milliseconds = sorted(1e3 * s for s in seconds)
    return {
        "ms": statistics.median(milliseconds),
        "spread_ms": [milliseconds[0], milliseconds[-1]],
        "peak_gib": peak / 2**30,
    }


def rows_of(shape: str, device: str) -> Iterator[dict]:
    """The table of one shape, tokens x width x vocabulary."""
    tokens, width, vocabulary = map(int, shape.split("x"))
    torch.manual_seed(0)
    heads = {"num_heads": width // 32, "head_dim": 64, "state_size": 16, "n_groups": 1}
    sizes = {"hidden_size": width, "vocab_size": vocabulary, "num_hidden_layers": 1, "pad_token_id": 0}
    with torch.device(device):
        lm = longroll.RecurrentLM(from_config("mamba2", sizes | heads))
        hidden = torch.randn(1, tokens, width, dtype=torch.bfloat16).requires_grad_()
        targets = torch.randint(vocabulary, (1, tokens))
    weight = lm.model.get_output_embeddings().weight
    exact = exact_gradient(hidden, weight, targets)
    for name, loss_of in ways(weight, lm):

        def step(loss_of: Loss = loss_of) -> Tensor:
            with torch.autocast(device, torch.bfloat16):
                loss = loss_of(hidden, targets)
            loss.backward()
            return loss.detach()

        hidden.grad = weight.grad = None
        try:
            loss = step().item()
            error = (hidden.grad.float() - exact).norm() / exact.norm()
            found = measure(step, [hidden, weight], device)
            yield {"shape": shape, "row": name, "loss": loss, "error": error.item(), **found}
        except Exception as failure:  # one that does not fit or run must not end the table
            print(f"{shape} {name}: {type(failure).__name__}: {(str(failure).splitlines() or [''])[0]}")


def exact_gradient(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Of the mean loss by the hidden states, in float32, a few rows at a time."""
    weight = weight.detach()
    parts = []
    for h, y in zip(hidden.detach()[0].float().split(1024), targets[0].split(1024), strict=True):
        probabilities = (h @ weight.T).softmax(dim=1)
        probabilities[torch.arange(len(y), device=y.device), y] -= 1
        parts.append(probabilities @ weight)
    return torch.cat(parts)[None] / targets.numel()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=SHAPES, help="tokens x width x vocabulary")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--json", help="write the results here")
    options = parser.parse_args()
    began = time.perf_counter()
    table: list[dict] = []
    for shape in options.shapes:
        for row in rows_of(shape, options.device):
            table.append(row)
            print(
                f"{shape:20} {row['row']:16} {row['ms']:9.2f} ms {row['peak_gib']:7.2f} GiB"
                f"  loss {row['loss']:.4f}, gradient's error {row['error']:.1e}",
                flush=True,
            )
        if options.json:
            made = provenance(seed=0, seconds=time.perf_counter() - began, device=options.device)
            result = {"what": "gpu_loss", "rows": table, "provenance": made}
            BenchmarkResult.from_json(result).write(options.json)


if __name__ == "__main__":
    main()
