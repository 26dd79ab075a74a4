"""The output of the code on the pages: ``python docs/page_outputs.py [PAGE ...]`` writes it again.

The ``python`` blocks of a page form one script. A ``text`` block that follows a ``python`` block
is its output. ``tests/docs/test_pages.py`` compares these blocks with what the code prints.
"""

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

DOCS = Path(__file__).parent
BLOCK = re.compile(r"```python\n(?P<code>.*?)```\n(?:\n```text\n(?P<output>.*?)```\n)?", re.DOTALL)
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "MPLBACKEND": "Agg",
    "ATEN_CPU_CAPABILITY": "default",
    "MKL_CBWR": "COMPATIBLE",
    "ONEDNN_MAX_CPU_ISA": "SSE41",
    "OPENBLAS_CORETYPE": "Nehalem",
}
"""One thread, and the instructions that all x86-64 processors of the last years have.

Libraries otherwise choose instructions by the processor, and training amplifies their rounding:
with those of another processor log p of the VAE on the first page changed by 0.06 nats per datum,
a tail index from 0.47 to 0.55, and with it the sentence that names the reason of the verdict.
"""
NO_COMPILER = """from ppl_vae.capture import policy
policy.COMPILING_PER_RECORDING = policy.BACKGROUND_MARGIN = float("inf")
"""
"""Lines before the code of a page: steps are compiled if measured times are long enough, so that
rounding would depend on the load of the machine."""
SECONDS = re.compile(r"\d+\.\d+ s\b")
MARK = "<end of block>"


def pages() -> list[Path]:
    """The pages that have ``python`` blocks."""
    return [path for path in sorted(DOCS.glob("*.md")) if "```python\n" in path.read_text()]


def shown(page: Path) -> list[str]:
    """The output of each ``python`` block of a page, as the page shows it; or ""."""
    return [block["output"] or "" for block in BLOCK.finditer(page.read_text())]


def printed(page: Path) -> list[str]:
    """What each ``python`` block of a page prints, durations excepted, as parts of one script.

    Raises:
        RuntimeError: if a block fails or warns.
    """
    blocks = [block["code"] for block in BLOCK.finditer(page.read_text())]
    script = NO_COMPILER + f"\nprint({MARK!r})\n".join(blocks)
    output = run_script(script, page.name)
    return [SECONDS.sub("... s", part) for part in output.split(f"{MARK}\n")]


def run_script(script: str, name: str) -> str:
    """What a script prints in a folder of its own, where warnings are errors.

    Raises:
        RuntimeError: if it fails or warns; ``name`` is in the message.
    """
    if "arviz" in script:  # the first import of ArviZ 0.x on a day warns of version 1.x
        subprocess.run([sys.executable, "-c", "import arviz"], capture_output=True, check=True)
    with tempfile.TemporaryDirectory() as folder:
        run = subprocess.run(
            [sys.executable, "-W", "error", "-c", script],
            cwd=folder,
            capture_output=True,
            text=True,
            env=os.environ | ENVIRONMENT,
        )
    if run.returncode != 0:
        raise RuntimeError(f"{name}: {run.stderr}")
    return run.stdout


def _rewrite(page: Path) -> None:
    outputs = iter(printed(page))

    def with_output(block: re.Match[str]) -> str:
        output = next(outputs)
        code = f"```python\n{block['code']}```\n"
        return f"{code}\n```text\n{output}```\n" if output else code

    page.write_text(BLOCK.sub(with_output, page.read_text()))


if __name__ == "__main__":
    for path in [DOCS / name for name in sys.argv[1:]] or pages():
        _rewrite(path)
