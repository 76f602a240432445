"""What judges the files of deploy/."""

from __future__ import annotations

import os
import pathlib
import shutil
import subprocess
import sys
from collections.abc import Callable

import pytest

from deploy.fleet import PATH

ROOT = pathlib.Path(__file__).parent.parent.parent
DEPLOY = ROOT / "deploy"

Program = Callable[..., "subprocess.CompletedProcess[str]"]


def run(*command: str | os.PathLike[str], **more: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(word) for word in command],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PATH": PATH, **more},
    )


@pytest.fixture(scope="session")
def tools() -> pathlib.Path:
    """Where scripts/deploy_tools.sh has put its programs."""
    done = run(ROOT / "scripts" / "deploy_tools.sh", PYTHON=sys.executable)
    assert done.returncode == 0, done.stderr
    return pathlib.Path(done.stdout.strip())


@pytest.fixture
def debian() -> Program:
    """Runs a program of Debian's; a test is skipped where it is not installed."""

    def start(package: str, *command: str | os.PathLike[str]) -> subprocess.CompletedProcess[str]:
        if shutil.which(str(command[0]), path=PATH) is None:
            pytest.skip(f"SKIPPED, as {command[0]} is not here: apt-get install {package}")
        return run(*command)

    return start
