"""The texts: which files of Python's standard library train the model, and which never do.

``python corpus.py LIB [LIB ...]`` writes heldout.json: the held-out files are chosen by a rule
among the files that every given library holds, so that they can be evaluated with any of them.
The first library is the one to train on; its copies are the ones whose SHA-256 is recorded.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
from pathlib import Path

HERE = Path(__file__).resolve().parent
HELDOUT_JSON = HERE / "heldout.json"
HELDOUT_COUNT = 20
VALIDATION_COUNT = 16
HELDOUT_BYTES = (3_000, 60_000)  # small files say little, large ones would dominate the average
RULE = (
    "library files (no tests, no skipped folders) of 3000 to 60000 bytes that the standard "
    "libraries of Python 3.10, 3.11, 3.12 and 3.13 all hold, the 20 with the smallest SHA-256 "
    "of the path; validation takes the next 16"
)

SKIPPED_FOLDERS = (
    "site-packages", "dist-packages", "__pycache__",
    "encodings",  # generated character tables
    "pydoc_data",  # the language reference as one dict of strings
    "lib2to3/tests", "idlelib/Icons",  # Python 2 sources
    "msilib",  # generated database tables
    "ensurepip/_bundled", "lib-dynload",
)  # fmt: skip
SKIPPED_NAMES = re.compile(r"_sysconfigdata.*|levenshtein_examples.*|bad(syntax)?_.*")
MAX_LINE = 1_000  # longer lines are embedded data
MAX_DATA_SHARE = 0.12  # of digits and backslashes; tables of numbers and escapes are above it


def is_test(path: str) -> bool:
    return any(part in ("test", "tests", "idle_test") for part in Path(path).parts[:-1])


def keep(path: str, text: str) -> bool:
    """Whether a file is source a person wrote, rather than a table that costs model capacity."""
    if any(f"/{folder}/" in f"/{path}" for folder in SKIPPED_FOLDERS):
        return False
    if SKIPPED_NAMES.fullmatch(Path(path).name) or len(text) < 200:
        return False
    return max(map(len, text.splitlines())) <= MAX_LINE and data_share(text) <= MAX_DATA_SHARE


def data_share(text: str) -> float:
    return len(re.findall(r"[0-9\\]|[^\x00-\x7f]", text)) / max(len(text), 1)


def read_library(lib: Path) -> dict[str, str]:
    """Texts of the files worth training on, by path relative to ``lib``, in sorted order.

    Files that are not UTF-8 (some tests are not, on purpose) and exact copies are left out.
    """
    texts: dict[str, str] = {}
    seen: set[str] = set()
    for file in sorted(lib.rglob("*.py")):
        path = file.relative_to(lib).as_posix()
        if path.startswith(("site-packages/", "dist-packages/")):
            continue
        try:
            text = file.read_bytes().decode("utf-8").replace("\r\n", "\n")
        except UnicodeDecodeError:
            continue
        if text not in seen and keep(path, text):
            seen.add(text)
            texts[path] = text
    return texts


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def choose(libs: list[Path]) -> tuple[list[str], list[str]]:
    """Paths of the held-out and of the validation files by ``RULE``."""
    low, high = HELDOUT_BYTES
    candidates = [
        path
        for path, text in read_library(libs[0]).items()
        if not is_test(path)
        and low <= len(text.encode()) <= high
        and all((lib / path).is_file() for lib in libs)
    ]
    candidates.sort(key=lambda path: sha256(path.encode()))
    stop = HELDOUT_COUNT + VALIDATION_COUNT
    return sorted(candidates[:HELDOUT_COUNT]), sorted(candidates[HELDOUT_COUNT:stop])


def split(lib: Path) -> tuple[dict[str, str], dict[str, str], dict[str, str]]:
    """Training, validation and held-out texts of ``lib`` by the committed heldout.json."""
    record = json.loads(HELDOUT_JSON.read_text(encoding="utf-8"))
    texts = read_library(lib)
    heldout = {path: texts.pop(path) for path in record["files"]}
    validation = {path: texts.pop(path) for path in record["validation"]}
    return texts, validation, heldout


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("libs", nargs="+", type=Path, help="lib/pythonX.Y folders")
    parser.add_argument("--python", required=True, help="version of the first one, e.g. 3.11.7")
    arguments = parser.parse_args()
    heldout, validation = choose(arguments.libs)
    record = {
        "python": arguments.python,
        "rule": RULE,
        "files": {path: sha256((arguments.libs[0] / path).read_bytes()) for path in heldout},
        "validation": validation,
    }
    HELDOUT_JSON.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    print(f"{HELDOUT_JSON}: {len(heldout)} held-out, {len(validation)} validation files")


if __name__ == "__main__":
    main()
