"""The Dockerfile and the KServe manifest, as far as they can be checked without either: what is
copied is enough to install the package and to start the server that they start.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import tomllib
import zipfile
from pathlib import Path

import pytest
from fresh import ROOT, python

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("fresh")]
BUILD = "from setuptools import build_meta; print(build_meta.build_wheel('.'))"


def instructions(name: str) -> list[str]:
    """The arguments of a Dockerfile's instructions of one kind."""
    text = (ROOT / "Dockerfile").read_text().replace("\\\n", " ")
    return re.findall(rf"^{name} +(.+)$", text, re.MULTILINE)


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The package, built from what the Dockerfile copies and nothing else; to compile its kernels
    would take minutes.
    """
    context = tmp_path_factory.mktemp("context")
    for line in instructions("COPY"):
        *sources, target = line.split()
        for source in sources:
            if (ROOT / source).is_dir():
                ignored = shutil.ignore_patterns("__pycache__")
                shutil.copytree(ROOT / source, context / target, ignore=ignored)
            else:
                shutil.copy(ROOT / source, context / target)
    built = python("-c", BUILD, where=context, environment=os.environ | {"CXX": "", "PATH": ""})
    assert built.returncode == 0, built.stderr
    place = context / "installed"
    wheel = context / built.stdout.split()[-1]
    zipfile.ZipFile(wheel).extractall(place)
    return place


def test_the_image_has_all_of_the_package(installed: Path):
    """C++, pages and all; and the extra that is installed exists."""
    listed = subprocess.run(
        ["git", "ls-files", "quantize"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert [name for name in listed.stdout.split() if not (installed / name).is_file()] == []
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (wanted,) = re.findall(r'"\.\[(\w+)\]"', " ".join(instructions("RUN")))
    assert wanted in extras["optional-dependencies"]


def test_the_image_starts_the_server(installed: Path):
    """The entry point is a command of the package; its flags, its port and the manifest's are
    known.
    """
    command = json.loads(instructions("ENTRYPOINT")[0])
    manifest = (ROOT / "docs" / "kserve.yaml").read_text()
    (listed,) = re.findall(r"args:\n((?: +- .+\n)+)", manifest)
    arguments = re.findall(r'- "?([^"\n]+)', listed)
    entry = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    module, _, function = entry[command[0]].partition(":")
    code = f"import sys; from {module} import {function}; sys.exit({function}(sys.argv[1:]))"
    flags = [*command[1:], *arguments, "--help"]
    shown = python("-c", code, *flags, where=installed)
    assert shown.returncode == 0, shown.stderr
    for flag in filter(lambda each: each.startswith("--"), flags):
        assert flag in shown.stdout
    assert instructions("EXPOSE")[0] in shown.stdout
    assert f"containerPort: {arguments[arguments.index('--port') + 1]}" in manifest
