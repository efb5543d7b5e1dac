"""A browser to look at the page."""

import shutil
import subprocess
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def browser(tmp_path_factory):
    """Run headless Chromium with some arguments and return what it prints."""
    names = ("chromium", "chromium-browser", "google-chrome")
    program = next((path for name in names if (path := shutil.which(name))), None)
    if program is None:
        pytest.skip(f"no browser on PATH ({', '.join(names)}): install one to check the layout")

    def run(*arguments: str, page: Path) -> str:
        profile = tmp_path_factory.mktemp("profile")
        flags = "headless no-sandbox disable-gpu disable-quic no-first-run disable-background-networking"
        flags += " disable-component-update disable-sync hide-scrollbars allow-file-access-from-files"
        command = [
            program,
            *(f"--{flag}" for flag in flags.split()),
            f"--user-data-dir={profile}",
            *arguments,
        ]
        done = subprocess.run(
            [*command, page.as_uri()], capture_output=True, text=True, timeout=120, check=True
        )
        return done.stdout

    return run
