"""The small lineage, for the tests that read its results."""

import pytest


@pytest.fixture(scope="module")
def lineage():
    # Imported here, since pytest's filters of warnings do not hold while a conftest is loaded.
    import lineages

    return lineages.small_lineage()
