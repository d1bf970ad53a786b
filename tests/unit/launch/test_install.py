"""Which versions `make install` takes for which Python, and what it leaves to the machine's own torch."""

from __future__ import annotations

import re
import shutil
import site
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest

from launch import install
from tests.helpers import ROOT

PYTHONS = ["3.11", "3.12", "3.13"]
LINE = re.compile(r"[a-z0-9-]+==[^ ;]+")


def packages(python: str) -> dict[str, str]:
    return dict(line.split("==") for line in install.locked(python))


@pytest.mark.parametrize("python", PYTHONS)
def test_a_lock_holds_what_the_project_asks_for(python: str) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    asked = project["dependencies"] + project["optional-dependencies"]["dev"] + project["optional-dependencies"]["examples"]
    locked = packages(python)
    assert all(LINE.fullmatch(line) for line in install.locked(python))
    for text in asked:
        found = re.fullmatch(r"([\w.-]+)(?:\[\w+\])?>=([\d.]+)", text)
        assert found is not None, text
        at_least, version = (
            [int(number) for number in re.findall(r"\d+", part)] for part in (found[2], locked[name(found[1])])
        )
        assert version >= at_least, text
    assert {*install.INSTALLERS, *install.OF_TORCH} <= locked.keys()
    assert not [package for package in locked if package.startswith("nvidia-")]  # a machine without GPU needs none


def name(package: str) -> str:
    return re.sub(r"[-_.]+", "-", package).lower()


def test_pythons_differ_only_in_megatron_core() -> None:
    first, *others = map(packages, PYTHONS)
    for other in others:
        assert {package for package, version in other.items() if first.get(package) != version} == {"megatron-core"}
        assert other.keys() == first.keys()


def test_a_python_without_lock_is_refused() -> None:
    with pytest.raises(SystemExit, match=r"error: .* is Python 3\.9; set PYTHON to one of 3\.11, 3\.12, 3\.13$"):
        install.locked("3.9")


@pytest.mark.parametrize(
    ("version", "fits"), [("2.11.0+cu130", True), ("2.11.0a0", True), ("3.0", True), ("2.10.1", False), ("1.13.0", False)]
)
def test_a_torch_of_the_machine_must_be_new_enough(monkeypatch: pytest.MonkeyPatch, version: str, fits: bool) -> None:
    monkeypatch.setattr(metadata, "version", lambda package: version)
    if fits:
        install.check_system_torch()
    else:
        with pytest.raises(SystemExit, match=rf"has torch {re.escape(version)}; 2\.11 or newer is needed$"):
            install.check_system_torch()


def test_a_machine_without_torch_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(package: str) -> str:
        raise metadata.PackageNotFoundError(package)

    monkeypatch.setattr(metadata, "version", missing)
    with pytest.raises(SystemExit, match=r"has no torch; set PYTHON to one that has 2\.11 or newer$"):
        install.check_system_torch()


LINES = ["absl-py==2.5.1", "pip==26.3", "setuptools==84.2.1", "torch==2.13.0", "triton==3.7.1", "uv==0.13.9"]


def installed(monkeypatch: pytest.MonkeyPatch, system: bool, fails: tuple[str, ...] = (), gpu: bool = False) -> list[list[str]]:
    """pip or uv, and the arguments of each `install` that runs; commands that hold one of `fails` fail."""
    calls: list[list[str]] = []

    def run(command: list[str], check: bool, **options: object) -> subprocess.CompletedProcess[str]:
        program = Path(command[0]).name if command[1] != "-m" else command[2]
        calls.append([program, *command[command.index("install") + 1 :]])
        failed = any(part in fails for part in calls[-1]) or " ".join(calls[-1]) in fails
        assert not (failed and check)
        return subprocess.CompletedProcess(command, int(failed))

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr(shutil, "which", lambda program: program if gpu else None)
    install.install(Path("venv"), LINES, system)
    return calls


BASE = ["pip", "--quiet", "--upgrade", "pip==26.3", "setuptools==84.2.1", "uv==0.13.9"]
CONSTRAINED = ["pip", "--constraint", str(install.LOCKS / f"{sys.version_info[0]}.{sys.version_info[1]}.lock")]


def test_the_machines_torch_is_neither_installed_nor_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    others = [LINES[0], LINES[1], LINES[5]]  # setuptools fits torch, too
    assert installed(monkeypatch, system=True) == [["pip", "--quiet", "--upgrade", *others[1:]], ["pip", "--no-deps", *others]]


def test_without_gpu_the_cpu_build_is_tried_first(monkeypatch: pytest.MonkeyPatch) -> None:
    pip, cuda = [*CONSTRAINED, "torch==2.13.0+cpu"], [*CONSTRAINED, LINES[3]]
    uv, others = ["uv", "--compile-bytecode", "--torch-backend", "cpu", "torch==2.13.0"], ["uv", "--compile-bytecode", *LINES]
    assert installed(monkeypatch, False) == [BASE, pip, others]
    assert installed(monkeypatch, False, fails=("torch==2.13.0+cpu",)) == [BASE, pip, uv, others]
    assert installed(monkeypatch, False, fails=("torch==2.13.0+cpu", "cpu")) == [BASE, pip, uv, cuda, others]
    assert installed(monkeypatch, False, gpu=True) == [BASE, cuda, others]


def test_where_uv_finds_no_packages_pip_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    others = ["uv", "--compile-bytecode", *LINES]
    assert installed(monkeypatch, False, fails=(" ".join(others),))[2:] == [others, ["pip", *LINES]]


@pytest.mark.parametrize("version", ["3.9.1", f"{sys.version_info[0]}.{sys.version_info[1]}.0"])
@pytest.mark.parametrize("system", [False, True])
@pytest.mark.parametrize("asked", [None, "locked", "system"])
def test_an_environment_of_another_kind_is_kept(tmp_path: Path, version: str, system: bool, asked: str | None) -> None:
    (tmp_path / "pyvenv.cfg").write_text(f"include-system-site-packages = {str(system).lower()}\nversion = {version}\n")
    if version != "3.9.1" and asked in (None, "system" if system else "locked"):
        assert install.check_venv(tmp_path, asked) == system
    else:
        with pytest.raises(SystemExit, match=f"was made with Python {version[:3]}.* torch; delete it \\(make clean\\)"):
            install.check_venv(tmp_path, asked)


@pytest.mark.parametrize("line", ["version_info = {}.1", "version_info = {}.1.final.0", "version={}.1"])
def test_environments_of_uv_and_virtualenv_are_known(tmp_path: Path, line: str) -> None:
    (tmp_path / "pyvenv.cfg").write_text(f"uv = 0.13.9\n{line.format('{}.{}'.format(*sys.version_info))}\n")
    assert not install.check_venv(tmp_path, None)


@pytest.mark.parametrize("has_pip", [True, False])
def test_an_environment_without_pip_gets_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, has_pip: bool) -> None:
    commands: list[list[str]] = []

    def run(command: list[str], check: bool, **options: object) -> subprocess.CompletedProcess[str]:
        commands.append(command[1:])
        return subprocess.CompletedProcess(command, int(not has_pip and "pip" in command))

    monkeypatch.setattr(subprocess, "run", run)
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/python").touch()
    install.make_venv(tmp_path, system=False)
    assert commands == [["-m", "pip", "--version"], ["-m", "ensurepip"]][: 1 if has_pip else 2]


def test_a_system_that_is_an_environment_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As an image's /opt/venv: `venv --system-site-packages` would look into the Python behind it."""
    packages = tmp_path / "lib" / "python3.12" / "site-packages"
    packages.mkdir(parents=True)
    commands: list[list[str]] = []
    monkeypatch.setattr(subprocess, "run", lambda command, check: commands.append(command))
    monkeypatch.setattr(sys, "prefix", "/opt/venv")
    install.make_venv(tmp_path, system=True)
    assert commands == [[sys.executable, "-m", "venv", "--system-site-packages", str(tmp_path)]]
    assert (packages / "system.pth").read_text().split() == site.getsitepackages()
