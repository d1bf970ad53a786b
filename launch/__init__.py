"""The commands. A package that is missing where they run is one line, not a traceback."""

import sys
from types import TracebackType

from configs.packages import MODULES, not_installed

_PACKAGES = {module.partition(".")[0]: package for package, module in MODULES.items()}
_OURS = ("configs", "data_pipeline", "launch", "model", "pretrain")


def _report(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    name = getattr(error, "name", None) or ""
    root = name.partition(".")[0]
    if isinstance(error, ModuleNotFoundError) and root not in _OURS:
        package = _PACKAGES.get(root, name)
        print(f"error: {package} {not_installed()}", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, trace)


sys.excepthook = _report
