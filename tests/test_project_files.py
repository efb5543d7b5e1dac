"""The files that people expect of a project agree with each other and with the code."""

import ast
import re
import subprocess
import sys
import tomllib
from importlib.metadata import packages_distributions, requires
from pathlib import Path

import pytest
import yaml

import longroll

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
SOURCE = Path(longroll.__file__).parent
OPTIONAL = {"triton", "fla", "trl", "lm_eval"}
"""Imported only where they are installed."""


def name_of(requirement: str) -> str:
    return re.match(r"[A-Za-z0-9_.-]+", requirement)[0].lower().replace("_", "-")


def test_every_import_is_of_a_declared_dependency_or_of_what_one_requires():
    declared = {name_of(r) for r in PROJECT["dependencies"] + PROJECT["optional-dependencies"]["lora"]}
    allowed = declared | {name_of(r) for d in declared for r in requires(d) or () if "extra ==" not in r}
    homes, unknown = packages_distributions(), set()
    for path in SOURCE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and not node.level:
                names = [node.module]
            for name in {n.split(".")[0] for n in names} - OPTIONAL - {"longroll"} - sys.stdlib_module_names:
                if not {name_of(home) for home in homes.get(name, ())} & allowed:
                    unknown.add(f"{path.relative_to(SOURCE)}: {name}")
    assert not unknown


def test_lowest_versions_are_those_of_pyproject():
    ran = subprocess.run(
        [sys.executable, ROOT / "dev/lowest.py", "lora"], capture_output=True, text=True, check=True
    )
    wanted = PROJECT["dependencies"] + PROJECT["optional-dependencies"]["lora"]
    assert ran.stdout.split() == [r.replace(">=", "==") for r in wanted]


def test_constraints_are_at_or_above_the_lower_bounds():
    pinned = dict(
        line.split("==") for line in (ROOT / "constraints.txt").read_text().split("\n") if "==" in line
    )

    def parts(version: str) -> list[int]:
        return [int(part) for part in re.findall(r"\d+", version)]

    for requirement in PROJECT["dependencies"]:
        name, bound = requirement.split(">=")
        assert parts(pinned[name]) >= parts(bound), requirement


def test_citation_has_the_version_and_the_paper():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == PROJECT["version"] and citation["license"] == PROJECT["license"]
    assert citation["preferred-citation"]["url"] == PROJECT["urls"]["Paper"]


@pytest.mark.parametrize("path", sorted((ROOT / ".github").rglob("*.yml")), ids=lambda p: p.stem)
def test_workflows_and_forms_run_commands_that_exist(path):
    text = path.read_text()
    assert yaml.safe_load(text)
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert {*re.findall(r"run: make ([a-z-]+)", text)} <= {*targets}


def test_workflows_try_the_python_versions_of_the_classifiers():
    named = re.findall(r":: (3\.\d+)", "\n".join(PROJECT["classifiers"]))
    jobs = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())["jobs"]
    assert jobs["tests"]["strategy"]["matrix"]["python"] == named
    assert PROJECT["requires-python"] == f">={named[0]}"


LINK = re.compile(r"\]\(([^)\s#]+)(#[^)\s]*)?\)")


GLOBS = ("*.md", "docs/**/*.md", "*/README.md")
PAGES = sorted({p.relative_to(ROOT).as_posix() for glob in GLOBS for p in ROOT.glob(glob)})


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_to_files_of_the_repository(page):
    text = re.sub(r"^```.*?^```", "", (ROOT / page).read_text(), flags=re.DOTALL | re.MULTILINE)
    made = {"api.md", "cli.md", "recipes.md", "benchmarks.md", "contributing.md", "changelog.md"}  # by mkdocs
    for target, _ in LINK.findall(text):
        if not re.match(r"[a-z]+:", target) and not (page.startswith("docs/") and target in made):
            assert ((ROOT / page).parent / target).exists(), f"{page}: {target}"
