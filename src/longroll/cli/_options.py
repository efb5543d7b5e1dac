"""Options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from longroll.cli._numbers import length_option

if TYPE_CHECKING:
    import torch

    from longroll.data import Corpus, DocumentLengths, Tokenizer
    from longroll.measure import Kept
    from longroll.measure.held_out import HeldOut
    from longroll.model import RecurrentLM

Model = Annotated[
    str, typer.Argument(help='A model folder, a hub id, or "specimen", the small model inside the package.')
]
Text = Annotated[
    str,
    typer.Option(
        help="Text: a folder, a file (.txt, .json, .jsonl, .csv, .tsv, .parquet, compressed or not), a hub "
        'dataset id, several of these with commas, or "stdlib": the source code of Python\'s standard '
        "library."
    ),
]
TextColumn = Annotated[
    str | None,
    typer.Option(
        help="Column of the text in JSON, CSV, TSV, Parquet and hub data. Default: text, content, or "
        "the only column of strings."
    ),
]
TokenizerName = Annotated[
    str | None,
    typer.Option(
        "--tokenizer", help='A tokenizer folder, a hub id, or "bytes". Default: the tokenizer of the model.'
    ),
]
Bos = Annotated[
    bool | None,
    typer.Option(
        "--bos/--no-bos",
        help="Begin each document and prompt with BOS. Default: as the tokenizer does.",
        show_default=False,
    ),
]
TrainLength = Annotated[
    int | None,
    length_option(help="Training length T of the model in tokens. Default: from the config of the model."),
]
Length = Annotated[int, length_option(help="Positions to measure, in tokens; 16k is 16 x 1024.")]
Sequences = Annotated[int, typer.Option(help="Number of texts to measure.", min=1)]
Concatenate = Annotated[bool, typer.Option("--concatenate", help="Join documents if none is long enough.")]
ChunkSize = Annotated[
    int | None, length_option(help="Tokens of a text in one forward. Default: by the free memory.")
]
Device = Annotated[
    str | None,
    typer.Option(
        help="cpu, cuda, cuda:1, ...; auto spreads the layers over all GPUs. Default: a GPU if there is one."
    ),
]
Dtype = Annotated[
    str | None,
    typer.Option(
        help="Dtype of the weights: float32, bfloat16, float16; int8 holds large linear layers in 8 bits. "
        "Default: float32 on a CPU, that of the checkpoint on a GPU."
    ),
]
TrustRemoteCode = Annotated[
    bool,
    typer.Option("--trust-remote-code", help="Run code that comes with the checkpoint or the tokenizer."),
]
PluginName = Annotated[
    str | None,
    typer.Option(
        "--plugin",
        metavar="MODULE[:BUILD]",
        help="Python module to import first; its function BUILD makes the model by its name.",
    ),
]
Seed = Annotated[int, typer.Option(help="Random seed.", min=0, max=2**32 - 1)]


def file_to_write(context: typer.Context, path: Path | None) -> Path | None:
    """Check a file to write before the work; if it is standard output (`-`), tables go to standard error."""
    from longroll.cli._console import out
    from longroll.files import check_writable, descriptor

    if path is None or context.resilient_parsing:
        return path
    path = Path("/dev/stdout") if str(path) == "-" else path
    if descriptor(path) == 1:
        out.stderr = True
        context.call_on_close(lambda: setattr(out, "stderr", False))
    return check_writable(path)


def folder_to_write(context: typer.Context, path: Path | None) -> Path | None:
    """Make a folder to write into before the work."""
    from longroll.files import check_writable

    return path and (path if context.resilient_parsing else check_writable(path, folder=True))


Json = Annotated[
    Path | None,
    typer.Option("--json", help="File for the results; - is standard output.", callback=file_to_write),
]
Output = Annotated[
    Path | None, typer.Option(help="Folder for results, figures and report.", callback=folder_to_write)
]


def kept_beside(*files: Path | None) -> Kept:
    """Return where a measurement keeps what is done, beside the first result file that it can go on from."""
    from longroll.cli._console import console
    from longroll.files import is_stream
    from longroll.measure import Kept

    file = next((file for file in files if file and not is_stream(file)), None)
    folder = file and file.with_name(f"{file.name}.kept")
    if folder and folder.is_dir() and any(folder.iterdir()):
        console.print(f"Goes on from what is kept in {folder}.", soft_wrap=True)
    return Kept(folder)


def open_model(
    model: str,
    *,
    device: str | None,
    dtype: str | None,
    trust_remote_code: bool = False,
    plugin: str | None = None,
) -> RecurrentLM:
    """Load a model, and say so while it takes its time."""
    from longroll.cli._console import hush_libraries
    from longroll.cli._progress import waiting
    from longroll.model import load
    from longroll.ranks import local_device

    hush_libraries()
    device = local_device(device)
    with waiting(f"loading {model}"):
        return load(model, device=device, dtype=dtype, trust_remote_code=trust_remote_code, plugin=plugin)


def find_train_length(lm: RecurrentLM, given: int | None) -> int:
    """Return T, after saying where it comes from."""
    from longroll.cli._console import console

    length, origin = lm.find_train_length(given)
    console.print(f"T = {length:,} ({'--train-length' if given else origin}).", highlight=False)
    return length


def stated_train_length(lm: RecurrentLM) -> int | None:
    """Return T, after saying where it comes from; None, which is said too, for a model that does not tell."""
    from longroll.cli._console import console
    from longroll.errors import LongrollError

    try:
        return find_train_length(lm, None)
    except LongrollError as error:
        console.print(f"{str(error).partition(':')[0]}: no figure marks it.", markup=False, highlight=False)
        return None


def open_tokenizer(
    lm: RecurrentLM,
    model: str,
    tokenizer: str | None,
    *,
    bos: bool | None = None,
    trust_remote_code: bool = False,
) -> Tokenizer:
    """Return the tokenizer named, or the model's own; says what it begins documents with."""
    from longroll.cli._console import console
    from longroll.data import ByteTokenizer, load_tokenizer

    built = lm.wrapped and not Path(model).exists()  # `model` is a name that the plug-in knows
    path = None if model == "specimen" or built else model
    opened = load_tokenizer(
        tokenizer,
        model_path=path,
        vocab_size=lm.vocab_size,
        bos=bos,
        trust_remote_code=trust_remote_code,
    )
    if not isinstance(opened, ByteTokenizer):
        ids = opened.prefix_ids
        first = f"with {opened.decode(ids)!r} (id {', '.join(map(str, ids))})" if ids else "without BOS"
        why = "as the tokenizer does" if bos is None else "by --bos" if bos else "by --no-bos"
        console.print(f"Documents begin {first}, {why}.", markup=False, highlight=False, soft_wrap=True)
    return opened


def text_flags(text: str, column: str | None, tokenizer: str | None, bos: bool | None) -> tuple[str, ...]:
    """Return the flags by which another command reads the same text; defaults are left out."""
    given = {"--text": None if text == "stdlib" else text, "--text-column": column, "--tokenizer": tokenizer}
    told = [part for flag, value in given.items() if value is not None for part in (flag, value)]
    return (*told, *([] if bos is None else ["--bos" if bos else "--no-bos"]))


def read_corpus(
    text: str, tokenizer: Tokenizer, *, split: str, column: str | None, max_tokens: int | None, seed: int
) -> Corpus:
    """Read and tokenise text with a progress bar."""
    from longroll.cli._progress import progress
    from longroll.data import Corpus

    with progress(f"reading {text}", total=max_tokens) as advance:
        return Corpus.from_source(
            text,
            tokenizer,
            split=split,
            max_tokens=max_tokens,
            seed=seed,
            text_column=column,
            progress=lambda done, _: advance(done),
        )


def read_training_text(
    text: str, tokenizer: Tokenizer, *, column: str | None, max_tokens: int, seed: int
) -> Corpus:
    """Return the training split of a source; of a file of `messages` conversations, with the loss on
    answers.
    """
    from longroll.data import ChatCorpus, HFTokenizer, is_chat, read_conversations
    from longroll.errors import LongrollError

    if not is_chat(text, column):
        return read_corpus(text, tokenizer, split="train", column=column, max_tokens=max_tokens, seed=seed)
    if not isinstance(tokenizer, HFTokenizer):
        raise LongrollError(
            f"{text} is chat data and the tokenizer {tokenizer.name} has no chat template: name one that has "
            "by --tokenizer."
        )
    conversations = read_conversations(text, column=column, split="train")
    return ChatCorpus.from_conversations(conversations, tokenizer, max_tokens=max_tokens)


def count_documents(
    text: str, tokenizer: Tokenizer, *, column: str | None, length: int, rows: int
) -> DocumentLengths:
    """Return how long the documents are that a repair trains on, whatever its steps and its seed.

    Args:
        text: the source.
        tokenizer: the tokenizer of the model.
        column: the column of the text.
        length: T.
        rows: rows of a batch, of all ranks together.
    """
    from longroll.cli._console import unheard
    from longroll.cli._progress import progress
    from longroll.data import DocumentLengths, is_chat, read_documents
    from longroll.interventions.recipes import enough_tokens

    enough = enough_tokens(length, rows)
    if is_chat(text, column):
        corpus = read_training_text(text, tokenizer, column=column, max_tokens=enough, seed=0)
        return DocumentLengths.of(corpus, enough)
    # files that are left out are told of where the text is read
    with unheard(), progress(f"counting the documents of {text}", total=enough) as advance:
        return DocumentLengths.count(
            read_documents(text, split="train", text_column=column, seed=0),
            tokenizer,
            enough,
            progress=lambda done, _: advance(done),
        )


def read_held_out(
    text: str, tokenizer: Tokenizer, *, column: str | None, length: int, seed: int
) -> tuple[HeldOut | None, str]:
    """Return text that training does not read, to tell whether a model breaks; or None, and why."""
    from longroll.data import is_chat
    from longroll.errors import LongrollError
    from longroll.measure.held_out import FEWEST, LENGTHS, TEXTS, HeldOut

    if is_chat(text, column):
        return None, f"{text} is chat data, whose conversations are short"
    most = 4 * TEXTS * (max(LENGTHS) * length + 1)  # enough to find long documents among
    try:
        corpus = read_corpus(text, tokenizer, split="validation", column=column, max_tokens=most, seed=seed)
    except LongrollError as error:
        return None, str(error).rstrip(".")
    found = HeldOut.from_corpus(corpus, length, seed=seed)
    needed = f"{FEWEST} texts of {min(LENGTHS)} T = {min(LENGTHS) * length:,} tokens"
    return found, f"the {corpus.tokens:,} held-out tokens of {text} are too few to tell ({needed} are enough)"


def read_sequences(
    text: str,
    tokenizer: Tokenizer,
    *,
    length: int,
    sequences: int,
    column: str | None = None,
    concatenate: bool = False,
    seed: int = 0,
    split: str = "validation",
) -> tuple[torch.Tensor, float]:
    """Return long texts of a split, (sequences, length + 1), and the mean number of bytes in a token."""
    from longroll.cli._console import console
    from longroll.data import bytes_per_token, long_sequences

    # joined documents need no more than what is asked; whole long ones have to be found among all
    max_tokens = 2 * sequences * (length + 1) if concatenate else None
    corpus = read_corpus(text, tokenizer, split=split, column=column, max_tokens=max_tokens, seed=seed)
    tokens = long_sequences(corpus, length, sequences, concatenate=concatenate, seed=seed)
    short = int((corpus.lengths <= length).sum())
    if short and not concatenate:
        console.print(
            f"{short} of {corpus.documents} documents are shorter than {length + 1} tokens and left out.",
            highlight=False,
        )
    return tokens, bytes_per_token(tokens, tokenizer)
