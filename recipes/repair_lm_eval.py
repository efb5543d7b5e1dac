"""Score models that recipes/repair.py made by tasks of lm-evaluation-harness, before and after a repair.

    python recipes/repair.py mamba2-22m --tokens tokens --work work --output repair.json --weights default \\
        --weights "none rate=0.0001"
    python recipes/repair_lm_eval.py mamba2-22m --tokens tokens --work work --blimp blimp/data \\
        --wikitext wikitext-2 --output lm-eval.json

lm-eval's own task configurations read local files in place of the hub; `longroll.harness` runs the model:

- blimp: 67 sets of minimal pairs of sentences, accuracy; the folder `data` of github.com/alexwarstadt/blimp.
- lambada_openai: the last word of passages made of the valid books, as LAMBADA's are: at least 50 words
  before the last sentence, whose last word those hold; accuracy and perplexity.
- wikitext: WikiText-2's test side, word perplexity, by paragraph, and by article; most of these are longer
  than T.

Each arm waits for its weights, and is written to --output as soon as it is scored. The result of every item
is kept, so that models are compared on the same items.
"""

from __future__ import annotations

import argparse
import json
import re
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import lm_eval
import numpy as np
import timed
import torch
from repair import VOCABULARY
from repair_models import PLANS
from repair_text import Books
from safetensors.torch import load_file
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from longroll.harness import LongrollLM
from longroll.results import provenance, write_json

TASKS = Path(lm_eval.__file__).parent / "tasks"
ARMS = ("base", "none rate=0.0001", "default")
BEFORE, MOST = 50, 110  # words of a passage before its last sentence, and in all
_SENTENCE = re.compile(r"(?<=[.!?])[\"'\u201d\u2019]?\s+(?=[\"\u201c\u2018A-Z])")
_WORD = re.compile(r"[A-Za-z]{4,}")


def passages(text: str) -> list[str]:
    """Passages of one book, as LAMBADA's: they end in a word that the text before the last sentence holds."""
    found: list[str] = []
    for paragraph in re.split(r"\n\s*\n", text):
        held: list[str] = []
        for sentence in _SENTENCE.split(" ".join(paragraph.split())):
            words = sentence.split()
            last = re.sub(r"[^A-Za-z]+$", "", words[-1]) if words else ""
            fits = len(held) >= BEFORE and len(held) + len(words) <= MOST
            if fits and len(words) > 3 and _WORD.fullmatch(last) and last in _WORD.findall(" ".join(held)):
                found.append(" ".join([*held, *words[:-1], last]))
                held = []
            held = [*held, *words] if len(held) + len(words) <= MOST else []
    return found


def articles(text: str) -> list[str]:
    """Articles of a file of WikiText."""
    parts = re.split(r"(?m)^(?= = [^=\n]+ = \n)", text)
    return [part for part in parts if part.strip()]


def paragraphs(text: str) -> list[str]:
    """Lines of a file of WikiText that are no heading, of 20 words and more."""
    lines = (line.strip() for line in text.splitlines())
    return [f" {line} \n" for line in lines if not line.startswith("=") and len(line.split()) >= 20]


def spread(items: list[Any], most: int) -> list[Any]:
    """At most so many of the items, evenly over them."""
    return [items[i] for i in np.linspace(0, len(items) - 1, min(most, len(items)), dtype=int)]


def write_tasks(options: argparse.Namespace, folder: Path) -> list[str]:
    """Write task files and their data; return the tasks' names."""
    import yaml

    named: dict[str, tuple[Path, str, list[dict[str, Any]]]] = {}
    for path in sorted(options.blimp.glob("*.jsonl")) if options.blimp else []:
        template, rows = TASKS / "blimp/_template_yaml", path.read_text().splitlines()
        named[f"blimp_{path.stem}"] = (template, "train", spread([*map(json.loads, rows)], options.pairs))
    valid, tokenizer = Books.load(options.tokens / "valid.xz"), _tokenizer(options)
    texts = (tokenizer.decode(valid.book(i).tolist()) for i in range(valid.count))
    each = -(-options.passages // valid.count)
    made = [passage for text in texts for passage in spread(passages(text), each)]
    named["lambada_books"] = (
        TASKS / "lambada/lambada_openai.yaml", "test", [{"text": text} for text in made[: options.passages]],
    )  # fmt: skip
    if options.wikitext:
        text = (options.wikitext / "test.txt").read_text()
        for name, pages in (("paragraphs", paragraphs(text)), ("articles", articles(text))):
            rows = [{"page": page} for page in spread(pages, options.passages)]
            named[f"wikitext_{name}"] = (TASKS / "wikitext/wikitext.yaml", "test", rows)
    for name, (template, side, rows) in named.items():
        data = folder / f"{name}.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))
        task: dict[str, Any] = {"include": str(template), "task": name, "dataset_path": "json"}
        task |= {"dataset_name": None, "dataset_kwargs": {"data_files": {side: str(data)}}}
        if side == "test" and name.startswith("wikitext"):
            task |= {"training_split": None, "validation_split": None}
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(task, sort_keys=False))
    return [*named]


def score(lm: LongrollLM, names: list[str], folder: Path) -> dict[str, Any]:
    """Each task's figures as lm-eval gives them, and the result of every item."""
    found = lm_eval.simple_evaluate(
        lm,
        tasks=names,
        task_manager=lm_eval.tasks.TaskManager(include_path=str(folder), include_defaults=False),
        bootstrap_iters=0,
        log_samples=True,
    )
    assert found is not None
    tasks: dict[str, Any] = {}
    for name in names:
        figures = {
            key.removesuffix(",none"): value
            for key, value in found["results"][name].items()
            if key.endswith(",none") and isinstance(value, float)
        }
        items = sorted(found["samples"][name], key=lambda item: item["doc_id"])
        if "acc" in items[0]:
            kept: Any = {"right": "".join(str(int(item["acc"])) for item in items)}
        else:
            pairs = [item["word_perplexity"] for item in items]
            kept = {"log_likelihood": [round(a, 3) for a, _ in pairs], "words": [b for _, b in pairs]}
        tasks[name] = figures | {"items": len(items)} | kept
    return tasks


def averaged(tasks: dict[str, Any]) -> dict[str, float]:
    """The figures that are shown: BLiMP's mean over its sets, as lm-eval's group `blimp` takes it."""
    sets = [task["acc"] for name, task in tasks.items() if name.startswith("blimp_")]
    found = {"blimp": float(np.mean(sets))} if sets else {}
    books = tasks["lambada_books"]
    found |= {"lambada_books": books["acc"], "lambada_books_perplexity": books["perplexity"]}
    wiki = {name: task["word_perplexity"] for name, task in tasks.items() if name.startswith("wikitext")}
    return found | wiki


def _tokenizer(options: argparse.Namespace) -> Tokenizer:
    return Tokenizer.from_file(str(options.tokens / "tokenizer.json"))


def _folder(arm: str, options: argparse.Namespace, folder: Path) -> Path:
    """A checkpoint of an arm's weights with the tokenizer."""
    plan = PLANS[options.model]
    model = plan.build(plan, VOCABULARY)
    model.load_state_dict(load_file(options.work / options.model / f"{arm}.safetensors"), strict=False)
    model.config.train_length = plan.length
    model.save_pretrained(folder)
    words = PreTrainedTokenizerFast(
        tokenizer_object=_tokenizer(options), eos_token="<eot>", bos_token="<eot>"
    )
    words.save_pretrained(folder)
    return folder


def main() -> None:
    """Score each arm whose weights come in time."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("model", choices=PLANS)
    parser.add_argument("--tokens", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--arm", action="append", help=f"default: {', '.join(ARMS)}")
    parser.add_argument("--blimp", type=Path, metavar="FOLDER", help="BLiMP's data")
    parser.add_argument("--wikitext", type=Path, metavar="FOLDER", help="holds test.txt")
    parser.add_argument("--pairs", type=int, default=300, help="of each set of BLiMP")
    parser.add_argument("--passages", type=int, default=2000)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tasks = write_tasks(options, folder)
        for arm in options.arm or ARMS:
            timed.wait_for(options.work / options.model / f"{arm}.safetensors")
            began = time.perf_counter()
            lm = LongrollLM(str(_folder(arm, options, folder / "model")), device=options.device)
            found = score(lm, tasks, folder)
            made = provenance(lm.lm, seed=0, seconds=time.perf_counter() - began)
            results = json.loads(options.output.read_text()) if options.output.exists() else {}
            models = results.get("models", {})
            models.setdefault(options.model, {})[arm] = {
                "figures": averaged(found), "tasks": found, "lm_eval": version("lm_eval"), "provenance": made,
            }  # fmt: skip
            write_json(options.output, {"kind": "repair-lm-eval", "models": models})
            print(options.model, arm, averaged(found), f"{time.perf_counter() - began:.0f} s", flush=True)


if __name__ == "__main__":
    main()
