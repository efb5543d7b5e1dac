"""Position-wise loss of the specimen at 16k and 131k positions: memory must be constant and time linear.

    python benchmarks/long_evaluation.py --json benchmarks/results/long_evaluation.json
    python benchmarks/long_evaluation.py --lm-eval    # as one prompt of lm-evaluation-harness

Each measurement runs in its own process, so that its peak memory is its own.
"""

import argparse
import functools
import json
import resource
import statistics
import subprocess
import sys
import time

LENGTHS = (16_384, 131_072)


def measure(length: int, harness: bool) -> dict[str, float]:
    """Seconds and peak memory (MiB of this process) of one roll-out over joined standard-library source."""
    import longroll
    from longroll.data import ByteTokenizer, Corpus, long_sequences

    lm = longroll.load("specimen", device="cpu")
    corpus = Corpus.from_source(
        "stdlib", ByteTokenizer(), split="validation", max_tokens=2 * max(LENGTHS) + 2
    )
    tokens = long_sequences(corpus, length, 1, concatenate=True)
    score = prompt_score if harness else lambda tokens: longroll.position_loss(lm, tokens)
    score(tokens[:, :4096])  # warm up
    began = time.perf_counter()
    score(tokens)
    seconds = time.perf_counter() - began
    return {"seconds": seconds, "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}


@functools.cache
def harness_model():
    """The specimen as lm-evaluation-harness sees it."""
    from longroll.harness import LongrollLM

    return LongrollLM(pretrained="specimen", tokenizer="bytes", device="cpu")


def prompt_score(tokens) -> None:
    """Score a word after a prompt of these bytes, as a loglikelihood request."""
    from lm_eval.api.instance import Instance

    prompt = bytes(tokens[0].tolist()).decode("latin-1").encode("ascii", "replace").decode()
    harness_model().loglikelihood(
        [Instance(request_type="loglikelihood", doc={}, arguments=(prompt, " def"), idx=0)], disable_tqdm=True
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--json", help="write the results here")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--lm-eval", action="store_true", help="through the harness")
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(measure(arguments.one, arguments.lm_eval)))
        return
    began = time.perf_counter()
    medians = {}
    for length in LENGTHS:
        runs = []
        for _ in range(arguments.repeats):
            command = [sys.executable, __file__, "--one", str(length)]
            command += ["--lm-eval"] * arguments.lm_eval
            ran = subprocess.run(command, check=True, capture_output=True, text=True)
            runs.append(json.loads(ran.stdout.splitlines()[-1]))
        medians[length] = {key: statistics.median(run[key] for run in runs) for key in runs[0]}
        row = medians[length]
        rate = length / row["seconds"]
        print(
            f"{length:>8} positions {row['seconds']:7.2f} s {rate:8,.0f} tokens/s {row['peak_mib']:.0f} MiB"
        )
    short, long = (medians[length] for length in LENGTHS)
    ratios = {
        "time_over_linear": long["seconds"] / short["seconds"] / (LENGTHS[1] / LENGTHS[0]),
        "peak_memory": long["peak_mib"] / short["peak_mib"],
    }
    print("131k / 16k: " + ", ".join(f"{name} {value:.3f}" for name, value in ratios.items()))
    if arguments.json:
        from longroll.results import BenchmarkResult, provenance

        made = provenance(seed=0, seconds=time.perf_counter() - began)
        result = {"what": "long_evaluation", "medians": medians, "ratios": ratios, "provenance": made}
        BenchmarkResult.from_json(result).write(arguments.json)


if __name__ == "__main__":
    main()
