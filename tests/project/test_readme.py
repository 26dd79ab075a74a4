"""The README: its commands, its code, its length."""

import re
import tomllib

import pytest

import page_outputs
from files import ROOT


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)


@pytest.mark.parametrize("block", blocks("python"))
def test_readme_blocks_run(block):
    assert page_outputs.run_script(block, "README.md")


def test_readme_commands_name_what_there_is():
    commands = "\n".join(blocks("sh"))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert "pip install -e . && .venv/bin/ppl-vae lineage" in commands
    assert "pip install -e '.[test]' && .venv/bin/pytest" in commands
    assert project["scripts"] == {"ppl-vae": "ppl_vae.cli.main:main"}
    assert "test" in project["optional-dependencies"]


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150
