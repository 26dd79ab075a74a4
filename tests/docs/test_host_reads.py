"""The page of reads from an accelerator states what the code does."""

import re

import pytest

import host_reads
import pretend_device

pretend_device.register()


@pytest.mark.slow
@pytest.mark.skipif(
    bool(pretend_device.STATE.unsupported), reason=pretend_device.STATE.unsupported
)
def test_the_counts_of_the_page_are_those_of_the_code():
    """Lines may have moved; the page is written again by ``python docs/host_reads.py``."""
    lines = [
        text.splitlines() for text in (host_reads.PAGE.read_text(), "\n".join(host_reads.page()))
    ]
    written, found = ([re.sub(r":\d+`", "`", line) for line in part] for part in lines)
    assert sorted(written) == sorted(found)


def test_no_step_and_no_row_waits_but_for_em_and_the_objective():
    rows = [line.split(" | ") for line in host_reads.PAGE.read_text().split("##")[0].splitlines()]
    per_unit = {
        row[0].strip("| "): float(row[2]) for row in rows if len(row) == 5 and row[4][0].isdigit()
    }
    assert len(per_unit) == len(host_reads.ALGORITHMS)
    assert per_unit.pop("`fit_svi`") <= 1 / 25
    assert per_unit.pop("`fit_em`, complete data") <= 3
    assert per_unit.pop("`fit_em`, missing values") <= 5
    assert set(per_unit.values()) == {0.0}
