"""The README: its commands, its code, its length."""

import os
import re
import subprocess
import sys
import tomllib

import pytest
from files import ONE_THREAD, ROOT


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)


@pytest.mark.parametrize("block", blocks("python"))
def test_readme_blocks_run(block, tmp_path):
    if "arviz" in block:
        # The first import of ArviZ 0.x on a day warns of version 1.x.
        subprocess.run([sys.executable, "-c", "import arviz"], capture_output=True, check=True)
    run = subprocess.run(
        [sys.executable, "-W", "error", "-c", block],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env=os.environ | ONE_THREAD,
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout


def test_readme_commands_name_what_there_is():
    commands = "\n".join(blocks("sh"))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert "pip install -e . && .venv/bin/ppl-vae lineage" in commands
    assert "pip install -e '.[test]' && .venv/bin/pytest" in commands
    assert project["scripts"] == {"ppl-vae": "ppl_vae.cli.main:main"}
    assert "test" in project["optional-dependencies"]


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150
