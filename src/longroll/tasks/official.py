"""The official prompts of BABILong and RULER, read from the installed package lm-eval, which ships them.

The files are read, not imported: RULER's modules download data when they are imported.
"""

from __future__ import annotations

import ast
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from longroll.errors import LongrollError

PROMPTS = ("own", "official")
"""In whose words a task speaks."""


class Wording(NamedTuple):
    """The sentences of a needle task; `{key}` and `{value}` stand for what is drawn."""

    instruction: str
    needle: str
    question: str
    cue: str
    noise: str


def check_prompts(prompts: str) -> str:
    """Return the name of a form of prompts.

    Raises:
        LongrollError: it is not "own" or "official".
    """
    if prompts not in PROMPTS:
        raise LongrollError(f"`prompts` {prompts} is not one of {', '.join(PROMPTS)}.")
    return prompts


def babilong_prompt(qa: str) -> str:
    """Return the few-shot prompt of a task of BABILong, with `{context}` and `{question}` to be filled in.

    Args:
        qa: "qa1" to "qa20".

    Raises:
        LongrollError: lm-eval is not installed, or its files have changed.
    """
    import jinja2

    folder = _folder("babilong")
    try:
        common = _yaml(folder / "_babilong_common_yaml")
        task = {**common, **_yaml(folder / f"babilong_{qa}.yaml")}
        form = jinja2.Template(task["doc_to_text"])
        shots = task["fewshot_config"]["samples"][: task["num_fewshot"]]
        examples = [f"{form.render(**shot)}{task['target_delimiter']}{shot['target']}\n\n" for shot in shots]
        prompt: str = task["description"] + "".join(examples)
        question: str = form.render(input="{context}", question="{question}")
        return prompt + question
    except (OSError, KeyError, TypeError, jinja2.TemplateError) as problem:
        raise _changed(folder, problem) from None


def niah_wording() -> Wording:
    """Return the sentences of RULER's niah_single_1.

    Raises:
        LongrollError: lm-eval is not installed, or its files have changed.
    """
    folder = _folder("ruler")
    try:
        template = _constant(folder / "niah_utils.py", "TEMPLATE")
        needle = _constant(folder / "prepare_niah.py", "NEEDLE")
        noise = _constant(folder / "prepare_niah.py", "haystack")
        cue = _cue(folder / "prepare_niah.py")
    except (OSError, SyntaxError, KeyError) as problem:
        raise _changed(folder, problem) from None
    # RULER's own replacements for one needle
    for plural, one in (("Some", "A"), ("are all", "is"), ("are", "is"), ("answers", "answer")):
        template = template.replace(plural, one)
    template = template.replace("{type_needle_v}", "number").replace("{query}", "{key}")
    instruction, question = template.split("{context}")
    return Wording(
        instruction, needle.replace("{type_needle_v}", "numbers") + "\n", question.lstrip("\n"), cue, noise
    )


def _folder(task: str) -> Path:
    found = find_spec("lm_eval")
    if found is None or not found.submodule_search_locations:
        raise LongrollError("`prompts` official: lm-eval ships them: pip install 'longroll[lm-eval]'.")
    return Path(found.submodule_search_locations[0]) / "tasks" / task


def _changed(folder: Path, problem: Exception) -> LongrollError:
    return LongrollError(
        f"`prompts` official: {folder} does not hold them as lm-eval 0.4.13 does: {problem!r}."
    )


def _yaml(file: Path) -> dict[str, Any]:
    """Return a task's settings; functions in them are left aside."""
    import yaml

    class Loader(yaml.SafeLoader):  # type: ignore[misc]  # yaml ships no types
        pass

    Loader.add_constructor("!function", lambda loader, node: None)
    settings: dict[str, Any] = yaml.load(file.read_text(encoding="utf-8"), Loader=Loader)
    return settings


def _constant(file: Path, name: str) -> str:
    """Return the first string that a Python file gives to `name`."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant):
            names = [target.id for target in node.targets if isinstance(target, ast.Name)]
            if name in names and isinstance(node.value.value, str):
                return node.value.value
    raise KeyError(name)


def _cue(file: Path) -> str:
    """Return the beginning of the answer to one question, which RULER writes for the model."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.JoinedStr):
            text = "".join(_part(part) for part in node.values)
            if text.startswith("The special magic number for {key}") and text.endswith(" is"):
                return text
    raise KeyError("gen_prefix")


def _part(part: ast.expr) -> str:
    """Return a part of an f-string, with names for what is drawn."""
    if isinstance(part, ast.Constant):
        return str(part.value)
    return {"type_needle_v[:-1]": "number", "query": "{key}"}.get(ast.unparse(part.value), "?")  # type: ignore[attr-defined]
