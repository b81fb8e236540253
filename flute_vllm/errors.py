"""The one error type of the project: every message says what, where, why and what to do next."""

from __future__ import annotations


class FluteError(ValueError):
    """A problem the user can act on.

    Args:
        what: the operation that failed, one line without a full stop.
        where: the file, module or option concerned.
        why: the violated rule with the numbers that violate it.
        fix: the next thing to try.

    The four parts stay available as attributes, so that tests and callers need not parse text.
    """

    def __init__(self, what: str, *, where: str, why: str, fix: str) -> None:
        self.what, self.where, self.why, self.fix = what, where, why, fix
        super().__init__(f"flute: {what}\n  where: {where}\n  why: {why}\n  fix: {fix}")

    def __reduce__(self):
        # Errors cross process boundaries in vLLM; the default pickling passes only the message.
        return (_rebuild, (self.what, self.where, self.why, self.fix))


def _rebuild(what: str, where: str, why: str, fix: str) -> FluteError:
    return FluteError(what, where=where, why=why, fix=fix)


def format_size(nbytes: float) -> str:
    """Bytes for people, in powers of ten: ``4.61 MB``."""
    for unit in ("B", "kB", "MB"):
        if nbytes < 1000:
            return f"{nbytes:.4g} {unit}"
        nbytes /= 1000
    return f"{nbytes:.2f} GB"
