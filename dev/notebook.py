"""Execute notebooks in place, so that they hold the outputs of the present code.

    pip install ".[notebook]" && python dev/notebook.py examples/tutorial.ipynb

The outputs are those of one run: text and PNG pictures. Times and warnings of libraries are left out.
"""

from __future__ import annotations

import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient


def execute(path: Path) -> None:
    """Execute a notebook from top to bottom and write it back.

    Raises:
        nbclient.exceptions.CellExecutionError: a cell fails; the file is left as it was.
    """
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(notebook, timeout=3600, kernel_name="python3").execute()
    for cell in notebook.cells:
        cell.metadata = {}
        if cell.cell_type == "code":
            outputs = (o for o in cell.outputs if o.get("name") != "stderr")
            cell.outputs = [o for o in outputs if o.output_type != "clear_output"]
    notebook.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    nbformat.validate(notebook)
    nbformat.write(notebook, path)


if __name__ == "__main__":
    for name in sys.argv[1:]:
        execute(Path(name))
