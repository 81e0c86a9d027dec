"""Clients generated from the OpenAPI description: made anew, and compiled with a program that uses them without a cast.

python -m tests.clients               by openapi-typescript and openapi-python-client
python -m tests.clients typescript    by one of them

It installs both generators by name, with the compilers, in a folder that is kept in `.venv`.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from tests.api.world import World
from tests.support.application import ROOT

HERE = Path(__file__).parent
TOOLS = ROOT / ".venv" / "generators"

NPM = ("openapi-typescript@7.13.0", "openapi-fetch@0.17.0", "typescript@5.9.3")
PYPI = ("openapi-python-client==0.29.1", "mypy==2.4.1", "ruff==0.14.0")

TSC = ("--strict", "--noEmit", "--target", "es2022", "--lib", "es2022,dom", "--module", "nodenext")


def main(argv: Sequence[str] | None = None) -> int:
    """Make and compile the clients; 1 when one does not compile, or when a wrong program does."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="which; all by default")
    names = parser.parse_args(argv).names or [*CLIENTS]
    passed = failed = 0
    with tempfile.TemporaryDirectory(prefix="marketflow-clients-") as name:
        folder = Path(name)
        (folder / "openapi.json").write_bytes(World().ask("/openapi.json").content)
        for each in names:
            errors = CLIENTS[each](folder)
            print("\n".join(errors) or f"{each}: the generated client compiles, and a wrong use of it does not")
            passed, failed = passed + (not errors), failed + bool(errors)
    print(f"{passed} passed, {failed} failed")
    return 1 if failed else 0


def _typescript(folder: Path) -> list[str]:
    modules = _installed("npm", NPM, _npm) / "node_modules"
    (folder / "node_modules").symlink_to(modules)
    _run([modules / ".bin/openapi-typescript", "openapi.json", "-o", "schema.d.ts"], folder)
    return _compiled(folder, "program.ts", "latest.data.price", [modules / ".bin/tsc", *TSC])


def _python(folder: Path) -> list[str]:
    programs = _installed("pypi", PYPI, _pip) / "bin"
    _run([programs / "openapi-python-client", "generate", "--path", "openapi.json", "--meta", "none"], folder, programs)
    return _compiled(folder, "program.py", "latest.price", [programs / "mypy", "--strict"])


CLIENTS: dict[str, Callable[[Path], list[str]]] = {"typescript": _typescript, "python": _python}


def _compiled(folder: Path, name: str, used: str, command: Sequence[str | Path]) -> list[str]:
    """Return what is wrong: the errors of the program, or that one with a wrong name has none."""
    source = (HERE / name).with_suffix(".py.txt" if name.endswith(".py") else ".ts").read_text()
    assert used in source, f"{name} uses {used}"
    (folder / name).write_text(source)
    done = subprocess.run([*map(str, command), name], cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        return [f"{name} does not compile:", done.stdout + done.stderr]
    (folder / name).write_text(source.replace(used, f"{used}s"))
    done = subprocess.run([*map(str, command), name], cwd=folder, capture_output=True, text=True, check=False)
    return [] if done.returncode else [f"{name} compiles with {used}s, which does not exist"]


def _installed(kind: str, packages: Sequence[str], install: Callable[[Path, Sequence[str]], None]) -> Path:
    """Return the folder with these packages, made anew where others are in it."""
    folder, marker = TOOLS / kind, TOOLS / kind / "installed"
    if not marker.exists() or marker.read_text() != " ".join(packages):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        install(folder, packages)
        marker.write_text(" ".join(packages))
    return folder


def _npm(folder: Path, packages: Sequence[str]) -> None:
    options = ("--no-audit", "--no-fund", "--ignore-scripts", "--loglevel=error")
    _run(["npm", "install", "--prefix", folder, *options, *packages], folder)


def _pip(folder: Path, packages: Sequence[str]) -> None:
    _run([sys.executable, "-m", "venv", folder], folder)
    _run([folder / "bin" / "pip", "install", "-q", *packages], folder)


def _run(command: Sequence[str | Path], folder: Path, programs: Path | None = None) -> None:
    """Run a command that looks for others in the folder of programs first: the generator runs any ruff it finds."""
    path = os.environ["PATH"] if programs is None else f"{programs}{os.pathsep}{os.environ['PATH']}"
    words, environment = [*map(str, command)], os.environ | {"PATH": path}
    done = subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{command[0]} failed:\n{done.stdout}{done.stderr}")


if __name__ == "__main__":
    began = time.monotonic()
    code = main()
    print(f"== clients: {time.monotonic() - began:.0f} s", flush=True)
    sys.exit(code)
