"""Make a virtual environment for the Python that runs this: `python3.12 launch/install.py .venv`.

It gets the versions of requirements/. Without an NVIDIA GPU torch comes as its CPU build, if one can be had. With
`--torch system` it uses the torch, Triton and CUDA libraries of this Python, such as a GPU machine's image has.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import site
import subprocess
import sys
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LOCKS = ROOT / "requirements"
INSTALLERS = ("pip", "setuptools", "uv")
OF_TORCH = ("torch", "triton", "setuptools")  # what must fit the machine's torch; locks hold no CUDA libraries


def locked(version: str) -> list[str]:
    """The lines "package==version" for a Python such as "3.12"; exits if there are none."""
    path = LOCKS / f"{version}.lock"
    if not path.is_file():
        known = ", ".join(sorted(path.stem for path in LOCKS.glob("*.lock")))
        sys.exit(f"error: {sys.executable} is Python {version}; set PYTHON to one of {known}")
    return [line for line in path.read_text(encoding="utf-8").splitlines() if line and not line.startswith("#")]


def chosen(lines: list[str], *packages: str) -> list[str]:
    """The lines of some packages."""
    return [line for line in lines if line.partition("==")[0] in packages]


def lowest_torch() -> str:
    """The lowest version of torch in pyproject.toml."""
    found = re.search(r'"torch>=([\d.]+)"', (ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert found
    return found[1]


def check_system_torch() -> None:
    """Exit unless this Python has a torch that is new enough."""
    lowest = lowest_torch()
    try:
        version = metadata.version("torch")
    except metadata.PackageNotFoundError:
        sys.exit(f"error: TORCH=system: {sys.executable} has no torch; set PYTHON to one that has {lowest} or newer")
    if _numbers(version) < _numbers(lowest):
        sys.exit(f"error: TORCH=system: {sys.executable} has torch {version}; {lowest} or newer is needed")


def _numbers(version: str) -> list[int]:
    """[2, 11] of 2.11, 2.11.0+cu130 and 2.11.0a0."""
    return [int(number) for number in re.findall(r"\d+", version)[:2]]


def make_venv(venv: Path, system: bool) -> None:
    """A new environment with pip, or that in `venv` if there is one; system packages are visible in it if `system`."""
    python = str(venv / "bin" / "python")
    if Path(python).exists():
        if subprocess.run([python, "-m", "pip", "--version"], capture_output=True, check=False).returncode:
            subprocess.run([python, "-m", "ensurepip"], check=True)  # uv makes environments without pip
        return
    options = ["--system-site-packages"] if system else []
    subprocess.run([sys.executable, "-m", "venv", *options, str(venv)], check=True)
    if system and sys.prefix != sys.base_prefix:  # the system is an environment, too, which venv would look behind
        (packages,) = (venv / "lib").glob("python3*/site-packages")
        (packages / "system.pth").write_text("\n".join(site.getsitepackages()) + "\n", encoding="utf-8")


def check_venv(venv: Path, torch: str | None) -> bool:
    """Whether the existing environment uses the system's torch; exits if it is not what this Python and `torch` ask for."""
    text = (venv / "pyvenv.cfg").read_text(encoding="utf-8")
    system = re.search(r"^include-system-site-packages *= *true", text, re.MULTILINE) is not None
    python = re.search(r"^version(?:_info)? *= *(\d+\.\d+)", text, re.MULTILINE)  # uv and virtualenv: _info
    has = f"Python {python and python[1]} and {'the system’s' if system else 'its own'} torch"
    if python is None or python[1] != _version() or torch not in (None, "system" if system else "locked"):
        sys.exit(f"error: {venv} was made with {has}; delete it (make clean) or keep to that")
    return system


def install(venv: Path, lines: list[str], system: bool) -> None:
    pip = [str(venv / "bin" / "python"), "-m", "pip", "install"]
    if system:
        lines = [line for line in lines if line not in chosen(lines, *OF_TORCH)]
    subprocess.run([*pip, "--quiet", "--upgrade", *chosen(lines, *INSTALLERS)], check=True)
    if system:  # a lock is complete; without --no-deps pip might replace what does not please torch's metadata
        subprocess.run([*pip, "--no-deps", *lines], check=True)
        return
    (torch,) = chosen(lines, "torch")
    first = [*pip, "--constraint", str(LOCKS / f"{_version()}.lock")]  # what torch needs, at once in the locked version
    if shutil.which("nvidia-smi") is not None or not _install_cpu_build(venv, first, torch):
        subprocess.run([*first, torch], check=True)
    if not _install_by_uv(venv, lines):  # in half the time
        subprocess.run([*pip, *lines], check=True)  # knows sources that uv does not


def _install_by_uv(venv: Path, arguments: list[str]) -> bool:
    uv = [str(venv / "bin" / "uv"), "pip", "install", "--compile-bytecode", *arguments]  # as pip does
    return subprocess.run(uv, env={**os.environ, "VIRTUAL_ENV": str(venv)}, check=False).returncode == 0


def _install_cpu_build(venv: Path, pip: list[str], torch: str) -> bool:
    """From pip's sources if they have it, else from where uv knows it to be. False if neither can be reached."""
    if subprocess.run([*pip, f"{torch}+cpu"], stderr=subprocess.DEVNULL, check=False).returncode == 0:
        return True
    return _install_by_uv(venv, ["--torch-backend", "cpu", torch])


def _version() -> str:
    return "{}.{}".format(*sys.version_info)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("venv", type=Path, help="folder of the environment")
    parser.add_argument("--torch", choices=["locked", "system"], help="default: locked, or what an existing environment uses")
    parser.add_argument("--check", action="store_true", help="only check that the environment is of this kind")
    arguments = parser.parse_args()
    lines, system = locked(_version()), arguments.torch == "system"
    if (arguments.venv / "pyvenv.cfg").exists():
        system = check_venv(arguments.venv, arguments.torch)
    if arguments.check:
        return
    if system:
        check_system_torch()
    make_venv(arguments.venv, system)
    install(arguments.venv, lines, system)


if __name__ == "__main__":
    main()
