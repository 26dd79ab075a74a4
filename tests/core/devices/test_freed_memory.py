"""Freed memory is used again without the operating system."""

import platform
import subprocess
import sys

import pytest

FAULTS = """
import resource, torch
from ppl_vae.core.devices.freed_memory import keep_freed_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        parts = [torch.ones(2**20) for _ in range(4)]  # 4 MB each
        del parts
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

before = faults()
keep_freed_memory()
faults()
print(before, faults())
"""


@pytest.mark.slow
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="it is about the GNU C library")
def test_repeated_tensors_cause_no_page_faults():
    found = subprocess.run(
        [sys.executable, "-c", FAULTS], capture_output=True, text=True, check=True
    )
    before, after = map(int, found.stdout.split())
    assert before > 4096  # of 81,920 pages; how many depends on what was freed before
    assert after < 64
