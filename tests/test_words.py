"""Sentences of the code and the pages follow the rule of the house: some forms that break it are refused."""

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

import longroll

ROOT = Path(__file__).parent.parent
SOURCE = Path(longroll.__file__).parent
PER = (
    "row|head|file|command|rank|token|document|line|family|step|layer|channel|process|machine|program|batch|"
    "micro-batch|sequence|depth|group|position|octave|text|chunk|side|user|GPU|run"
)
VERBS = "counts?|takes|reads|says|knows?|gives|holds|costs|hangs|lets|wants|speaks|need"
NOUNS = "fault|state|function|tensor|model|byte|text|result|folder|sensible"
RULES = {
    "a sentence that opens with Of": r"(?:^|[.:;!?]\s+)Of (?!course)\w",
    "a sentence that opens with Else": r"(?:^|[.!?]\s+)Else\b",
    "a verb before not": rf"\b(?:{VERBS}) not\b",
    "for ever": r"\bfor ever\b",
    "to be had": r"\bto be had\b",
    "is no": rf"\bis no (?:{NOUNS})\b",
    "of ours, one's own": r"\bone's own\b|\bof (?:ours|theirs|longroll's own)\b",
    "a number a row: write for each": rf"\b(?:a|an|one) [a-z]+ (?:a|an) (?:{PER})\b",
    "anew, likewise, lest": r"\b(?:anew|likewise|lest|thereof|hence)\b",
    "all the same": r"\ball the same\b(?! (?:length|size|shape|text))",
    "a sentence that opens with What is": r"(?:^|[.]\s+)What (?:is|was|the|follows)\b(?![^.]*\?)",
    "mend": r"\b[Mm]end(?:s|ed|ing)?\b",
}
ARGUMENT = re.compile(r"^ +[\w*, ]+: (?:of|as for|likewise)\b", re.MULTILINE)
QUESTION = re.compile(r"(?:What|Whether|How|Which|Who|Whose|Where|Why)\b")


def strings(tree: ast.AST) -> Iterator[tuple[int, str]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and len(node.value.split()) > 2:
            yield node.lineno, node.value


def comments(text: str) -> Iterator[tuple[int, str]]:
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            yield token.start[0], token.string.lstrip("# ")


def paragraphs(text: str) -> Iterator[tuple[int, str]]:
    text = re.sub(r"^```.*?^```", lambda m: "\n" * m[0].count("\n"), text, flags=re.DOTALL | re.MULTILINE)
    for found in re.finditer(r"(?:[^\n]+\n?)+", text):
        yield text.count("\n", 0, found.start()) + 1, found[0]


def prose(path: Path) -> Iterator[tuple[int, str]]:
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".md":
        yield from paragraphs(text)
    else:
        yield from strings(ast.parse(text))
        yield from comments(text)


def faults(pieces: Iterator[tuple[int, str]]) -> list[str]:
    found = []
    for line, text in pieces:
        for rule, pattern in RULES.items():
            for match in re.finditer(pattern, re.sub(r"[`*_]", "", text)):
                around = text[max(0, match.start() - 30) : match.end() + 30].replace("\n", " ")
                found.append(f"line {line}: {rule}: ...{around}...")
    return found


FILES = sorted(
    [
        *SOURCE.rglob("*.py"),
        *(ROOT / "docs").rglob("*.md"),
        *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md", "benchmarks/README.md")),
    ]
)
EXCEPT = {"babilong_prompts.py"}
"""Words of others."""


@pytest.mark.parametrize("folder", sorted({str(f.parent.relative_to(ROOT)) for f in FILES}))
def test_sentences_stand_alone(folder):
    told = []
    for file in FILES:
        if str(file.parent.relative_to(ROOT)) == folder and file.name not in EXCEPT:
            told += [f"{file.name}: {fault}" for fault in faults(prose(file))]
    assert not told, "\n".join(told)


def functions() -> Iterator[tuple[str, ast.FunctionDef, str]]:
    for file in sorted(SOURCE.rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef) and (text := ast.get_docstring(node)):
                yield f"{file.relative_to(SOURCE)}: {node.name}", node, text


def test_docstrings_of_functions_say_what_they_do():
    told = []
    for place, node, text in functions():
        is_property = any("property" in ast.unparse(decorator) for decorator in node.decorator_list)
        if QUESTION.match(text) and not is_property:
            told.append(f"{place}: {text.splitlines()[0]}")
    assert not told, "begin with a verb, such as Return:\n" + "\n".join(told)


def test_arguments_are_described_by_a_noun():
    told = []
    for place, _, text in functions():
        told += [f"{place}: {match[0].strip()}" for match in ARGUMENT.finditer(text.partition("Args:")[2])]
    assert not told, "\n".join(told)


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("Of everything drawn at random.", "a sentence that opens with Of"),
        ("Returns it. Of two, the first.", "a sentence that opens with Of"),
        ("-100 counts not.", "a verb before not"),
        ("should read on for ever", "for ever"),
        ("is not to be had here", "to be had"),
        ("so that harder text is no fault", "is no"),
        ("a cache of ours", "of ours, one's own"),
        ("two rows, of a number a head", "a number a row: write for each"),
        ("What is left is dropped.", "a sentence that opens with What is"),
        ("how to mend it", "mend"),
    ],
)
def test_a_form_that_is_refused_is_found(text, rule):
    assert [fault for fault in faults(iter([(1, text)])) if rule in fault]


def test_plain_sentences_pass():
    plain = (
        "Return the number of rows. -100 is ignored. It does not count. What is the capital of it? Of course."
    )
    assert not faults(iter([(1, plain)]))
