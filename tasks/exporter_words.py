"""What exporters print, log, warn and raise: kept from failing anything, and cut down to what explains something."""

from __future__ import annotations

import contextlib
import io
import logging
import re
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field

from tasks.code import plain_words


@dataclass
class Noise:
    """What was printed and logged, and the warnings."""

    text: io.StringIO = field(default_factory=io.StringIO)
    caught: list[warnings.WarningMessage] = field(default_factory=list)

    def line_with(self, *needles: str) -> str:
        """Return the first line with the first needle that occurs, in brackets, or nothing."""
        lines = [line for needle in needles for line in self.text.getvalue().splitlines() if needle in line]
        return f" ({plain_words(lines[0], 300)})" if lines else ""


@contextlib.contextmanager
def quiet(*loggers: str) -> Iterator[Noise]:
    """Collect stdout, the named loggers' records and all warnings; afterwards the text goes to stderr.

    PyTorch's exporters print whole graphs on stdout, which is not theirs.
    """
    noise = Noise()
    handler = logging.StreamHandler(noise.text)
    with warnings.catch_warnings(record=True) as caught, contextlib.redirect_stdout(noise.text):
        warnings.simplefilter("always")
        noise.caught = caught
        for name in loggers:
            logging.getLogger(name).addHandler(handler)
        try:
            yield noise
        finally:
            for name in loggers:
                logging.getLogger(name).removeHandler(handler)
            lines = [f"{one.category.__name__}: {one.message}\n" for one in caught]
            sys.stderr.write(noise.text.getvalue() + "".join(dict.fromkeys(lines)))


def summary(error: BaseException) -> str:
    """Return the part of an exporter's error that says what is wrong, without its general advice."""
    text = str(error)
    text = text.partition("## Exception summary")[2] or text
    skipped = (
        "For more",
        "For extended",
        "For C++",
        "If you suspect",
        "(Refer to",
        "The error above",
        "consider using",
    )
    lines = [line.rstrip() for line in text.splitlines() if line.strip() and not line.lstrip().startswith(skipped)]
    return plain_words(re.sub(r"<class '(?:[\w.]*\.)?(\w+)'>", r"\1", "\n".join(dict.fromkeys(lines))), 1200)


def first_sentence(text: object) -> str:
    """Return a warning's first sentence."""
    return str(text).split(". ", maxsplit=1)[0].rstrip(".")
