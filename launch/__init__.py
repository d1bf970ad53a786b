"""The commands. A package that is missing where they run is one line, not a traceback."""

import sys
from types import TracebackType

_OURS = ("configs", "data_pipeline", "launch", "model", "pretrain")


def _report(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    name = getattr(error, "name", None) or ""
    if isinstance(error, ModuleNotFoundError) and name.partition(".")[0] not in _OURS:
        print(
            f"error: {name} is not installed for {sys.executable}; `make install` makes .venv with all it needs",
            file=sys.stderr,
        )
    else:
        sys.__excepthook__(kind, error, trace)


sys.excepthook = _report
