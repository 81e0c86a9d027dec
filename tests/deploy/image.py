"""The image without a Docker engine: the Dockerfile's own instructions, carried out in overlays of this machine's root.

The stand-in for the official Python image is this machine's root with this Python and its pip under /usr/local. RUN is
run as it stands, in a mount namespace; COPY copies what .dockerignore leaves; the container is a process in namespaces
of its own, with the user, variables, folder and entry point of the Dockerfile, and a root that is read-only.
What this cannot show: the content of the official base image.
"""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Mapping
from fnmatch import fnmatch
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import pip

from tests.support.application import ROOT

PYTHON = "3.11"
"""That of the image."""


class Instruction(NamedTuple):
    """One of a Dockerfile: what is done, its --options and its arguments."""

    word: str
    options: list[str]
    text: str

    @property
    def arguments(self) -> list[str]:
        """The text as a shell would split it, or the list that it is."""
        return json.loads(self.text) if self.text.startswith("[") else shlex.split(self.text)


def instructions(path: Path) -> list[Instruction]:
    """All of a Dockerfile, comments and line ends removed."""
    text = re.sub(r"\\\n", " ", re.sub(r"^#.*\n", "", path.read_text(), flags=re.MULTILINE))
    found = []
    for line in filter(None, map(str.strip, text.splitlines())):
        word, rest = line.split(maxsplit=1)
        options = []
        while match := re.match(r"(--\S+)\s+", rest):
            options.append(match[1])
            rest = rest[match.end() :]
        found.append(Instruction(word, options, rest))
    return found


def context(target: Path) -> None:
    """Copy to `target` what would be sent to a builder: .dockerignore is a list of exceptions from everything."""
    lines = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and not line.startswith("#")]
    assert lines[0] == "*"
    never = [line.removeprefix("**/") for line in lines[1:] if not line.startswith("!")]
    for name in (line[1:] for line in lines if line.startswith("!")):
        source = ROOT / name
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        if source.is_dir():
            shutil.copytree(source, target / name, ignore=shutil.ignore_patterns(*never))
        else:
            assert not any(fnmatch(source.name, pattern) for pattern in never)
            shutil.copy2(source, target / name)


class Stage:
    """What is built on the base image, as the upper layer of an overlay.

    Args:
        folder: where the layers are.
        name: of the stage.
    """

    def __init__(self, folder: Path, name: str) -> None:
        self.layer, self._work, self.root = (folder / f"{name}-{part}" for part in ("layer", "work", "root"))
        for each in (self.layer, self._work, self.root):
            each.mkdir(mode=0o755)
        self.base = folder / "base"
        self.variables: dict[str, str] = {
            "PATH": "/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin",
            # The copied interpreter looks for its library where it was built, which other users may not be able to
            # enter; the loader would then take a libpython of this machine. The official image has it in ld.so.cache.
            "LD_LIBRARY_PATH": "/usr/local/lib",
        }
        self.user = "0:0"
        self.folder = "/"
        self.entry_point: list[str] = []
        self.health_check: list[str] = []
        self.metadata: dict[str, str] = {}

    def carry_out(self, instruction: Instruction, source: Path, stages: Mapping[str, "Stage"]) -> None:
        """Do what one says."""
        word, options, text = instruction
        match word:
            case "RUN":
                assert all(option.startswith("--mount=type=cache,") for option in options)
                inherited = {name: value for name, value in os.environ.items() if name.startswith("PIP_")}
                command = ["chroot", str(self.root), "sh", "-c", f"cd {self.folder} && {text}"]
                subprocess.run(self.inside("", command), env=inherited | self.variables | {"HOME": "/root"}, check=True)
            case "COPY":
                *names, target = instruction.arguments
                layer = stages[options[0].removeprefix("--from=")].layer if options else source
                for name in names:
                    self._copy(layer / name.lstrip("/"), target)
            case "ENV":
                for pair in instruction.arguments:
                    name, _, value = pair.partition("=")
                    self.variables[name] = value.replace("$PATH", self.variables["PATH"])
            case "WORKDIR":
                self.folder = text
                self.layer.joinpath(text.lstrip("/")).mkdir(parents=True, exist_ok=True)
            case "USER":
                self.user = text
            case "ENTRYPOINT":
                self.entry_point = instruction.arguments
            case "HEALTHCHECK":
                self.health_check = Instruction(word, [], text.removeprefix("CMD ")).arguments
                self.metadata[word] = " ".join(options)
            case _:
                self.metadata[word] = text

    def _copy(self, source: Path, target: str) -> None:
        place = self.layer / str(Path(self.folder, target)).lstrip("/")
        if source.is_dir():
            shutil.copytree(source, place, symlinks=True, dirs_exist_ok=True)
        else:
            goal = place / source.name if target.endswith("/") else place
            goal.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, goal)

    def inside(self, options: str, command: list[str]) -> list[str]:
        """A command as it is run where the stage is the root; `options` are for its mount."""
        layers = f"lowerdir={self.base}:/,upperdir={self.layer},workdir={self._work}"
        root = shlex.quote(str(self.root))
        prepare = [
            f"mount -t overlay overlay -o {shlex.quote(layers)} {root}",
            f"mount --rbind /dev {root}/dev",
            f"mount -t proc proc {root}/proc",
            f"mount -t tmpfs -o mode=1777 tmpfs {root}/tmp",
            f"mount -o remount,{options} {root}" if options else "",
        ]
        script = "; ".join(["set -e", *filter(None, prepare), 'exec "$@"'])
        return ["unshare", "--mount", "--pid", "--fork", "--kill-child", "sh", "-c", script, "sh", *command]

    def container(self, *arguments: str, program: list[str] | None = None) -> list[str]:
        """The command that runs it as an orchestrator would that gives it no right at all, and a root to read only."""
        user, group = self.user.split(":")
        identity = [f"--reuid={user}", f"--regid={group}", "--clear-groups"]
        rights = ["--bounding-set=-all", "--inh-caps=-all", "--no-new-privs"]
        enter = ["chroot", str(self.root), "setpriv", *identity, *rights, "env", f"--chdir={self.folder}"]
        return self.inside("ro", [*enter, *(self.entry_point if program is None else program), *arguments])


class Image:
    """The last stage of a Dockerfile, and the ones before.

    Args:
        dockerfile: which.
        folder: an empty one on a file system that an overlay can lie on.
    """

    def __init__(self, dockerfile: Path, folder: Path) -> None:
        self._folder = folder
        self._dockerfile = dockerfile

    @cached_property
    def stages(self) -> dict[str, Stage]:
        """Built by and by; the last one is the image."""
        _stand_in(self._folder / "base")
        context(source := self._folder / "context")
        found: dict[str, Stage] = {}
        for instruction in instructions(self._dockerfile):
            if instruction.word == "FROM":
                assert instruction.arguments[0] == "${PYTHON_IMAGE}"
                name = instruction.arguments[-1] if "AS" in instruction.arguments else "image"
                found[name] = Stage(self._folder, name)
            elif found:
                found[name].carry_out(instruction, source, found)
        return found

    @property
    def image(self) -> Stage:
        """The last stage."""
        return list(self.stages.values())[-1]


def _stand_in(base: Path) -> None:
    """Python as the official image has it: in /usr/local, with pip and without bytecode."""
    library = Path(sysconfig.get_path("stdlib"))
    home = Path(sys.base_prefix)
    unneeded = shutil.ignore_patterns("site-packages", "dist-packages", "__pycache__", "test", "idlelib", "tkinter")
    shutil.copytree(library, base / "usr/local/lib" / library.name, ignore=unneeded)
    site = base / "usr/local/lib" / library.name / "site-packages"
    shutil.copytree(Path(pip.__file__).parent, site / "pip", ignore=shutil.ignore_patterns("__pycache__"))
    for shared in home.glob(f"lib/libpython{PYTHON}.so*"):
        shutil.copy2(shared, base / "usr/local/lib")
    (base / "usr/local/bin").mkdir()
    shutil.copy2(Path(sys.executable).resolve(), base / f"usr/local/bin/python{PYTHON}")
    for name in ("python", "python3"):
        (base / "usr/local/bin" / name).symlink_to(f"python{PYTHON}")
