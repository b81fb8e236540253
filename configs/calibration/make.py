"""Writes python.txt, the bundled calibration text: ``python configs/calibration/make.py``.

Half prose, the language reference that ``help()`` shows (pydoc_data.topics), half source of the
standard library, both under the Python Software Foundation License. The files on which the bundled
model is tested (examples/stdlib_model/heldout.json) are left out.
"""

from __future__ import annotations

import json
import sysconfig
from pathlib import Path
from pydoc_data.topics import topics

HERE = Path(__file__).resolve().parent
SHARE = 200_000  # characters of each half
HELDOUT = HERE.parents[1] / "examples" / "stdlib_model" / "heldout.json"
# By people about many things, not tables: a spread of subjects and of styles.
SOURCES = (
    "argparse.py", "ast.py", "bdb.py", "collections/__init__.py", "csv.py", "dataclasses.py",
    "difflib.py", "fractions.py", "functools.py", "heapq.py", "http/client.py", "inspect.py",
    "logging/__init__.py", "pathlib.py", "random.py", "statistics.py", "textwrap.py",
    "threading.py", "unittest/case.py", "urllib/parse.py", "zipfile.py",
)  # fmt: skip


def main() -> None:
    record = json.loads(HELDOUT.read_text())
    unseen = {*record["files"], *record["validation"]}
    library = Path(sysconfig.get_paths()["stdlib"])
    prose = "\n\n".join(topics[name] for name in sorted(topics))[:SHARE]
    parts = [(library / name).read_text(encoding="utf-8") for name in SOURCES if name not in unseen]
    each = SHARE // len(parts)
    code = "\n\n".join(text[:each] for text in parts)
    (HERE / "python.txt").write_text(f"{prose}\n\n{code}", encoding="utf-8")


if __name__ == "__main__":
    main()
