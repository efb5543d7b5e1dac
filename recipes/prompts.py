"""Compare prompts in longroll's own words with the official ones: length, accuracy, loss of the answer.

    python recipes/prompts.py specimen --facts tasks_1-20_v1-2/en-10k

The official prompts come with lm-eval: pip install 'longroll[lm-eval]'. Prints a table in Markdown.
"""

import argparse

import numpy as np
import torch

from longroll import load
from longroll.data import load_tokenizer
from longroll.tasks import BABILong, Niah, Task, answer, read_stories

SAMPLES = 50


def measure(lm, task: Task, length: int) -> tuple[float, float, float]:
    """Return the mean tokens of a prompt, the accuracy, and the answer's loss in nats a token."""
    rng = np.random.default_rng(0)
    samples = [task.sample(length, rng=rng) for _ in range(SAMPLES)]
    tokens, right, losses = [], [], []
    for start in range(0, SAMPLES, 10):
        some = samples[start : start + 10]
        written = answer(lm, some, new_tokens=task.new_tokens, stop_id=task.stop_id)
        right += [task.score(sample, *ids)["accuracy"] for sample, ids in zip(some, written, strict=True)]
    for sample in samples:
        ids = torch.from_numpy(sample.tokens.astype(np.int64))[None].to(lm.device)
        with torch.no_grad():
            hidden, _ = lm(ids[:, :-1], logits=False)
        scores = lm.head(hidden[:, len(sample.prompt) - 1 :])[0]
        losses.append(torch.nn.functional.cross_entropy(scores, ids[0, len(sample.prompt) :]).item())
        tokens.append(len(sample.prompt))
    return float(np.mean(tokens)), float(np.mean(right)), float(np.mean(losses))


def main() -> None:
    """Measure every task with both prompts."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--facts", required=True, help="folder of bAbI's files")
    options = parser.parse_args()
    lm = load(options.model)
    path = None if options.model == "specimen" else options.model
    tokenizer = load_tokenizer(model_path=path, vocab_size=lm.vocab_size)
    print("| task | prompts | tokens of a prompt | accuracy | loss of the right answer (nats a token) |")
    print("|---|---|---|---|---|")
    for name in ("niah", "qa1", "qa2", "qa3", "qa4", "qa5"):
        for prompts in ("own", "official"):
            if name == "niah":
                task: Task = Niah(tokenizer, prompts=prompts)
            else:
                task = BABILong(tokenizer, name, read_stories(options.facts, name), prompts=prompts)
            found = measure(lm, task, 1024 if name == "niah" else 0)
            print(f"| {name} | {prompts} | {found[0]:.0f} | {found[1]:.2f} | {found[2]:.2f} |", flush=True)


if __name__ == "__main__":
    main()
