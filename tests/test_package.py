"""What every package has: a version, its public names, types, a way to run it."""

import subprocess
import sys
from importlib.metadata import version
from importlib.resources import files

import longroll


def test_version_and_names():
    assert longroll.__version__ == version("longroll")
    assert {*longroll.__all__} <= {*dir(longroll)} and all(hasattr(longroll, name) for name in dir(longroll))
    assert not [name for name in dir(longroll) if name.startswith("_") and name != "__version__"]
    assert (files("longroll") / "py.typed").is_file()


def test_the_package_runs_as_a_module():
    ran = subprocess.run([sys.executable, "-m", "longroll", "--version"], capture_output=True, text=True)
    assert ran.stdout.strip() == f"longroll {version('longroll')}", ran.stderr
