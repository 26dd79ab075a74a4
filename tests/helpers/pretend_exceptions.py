"""Tests that ``pytest --pretend-gpu`` does not run, each with its reason.

A key is a test's file and name, without parameters; tests/test_pretend_run.py checks that each is
there, and that they are few.
"""

COMPILER = "a pretended accelerator has no compiler"

EXCEPTIONS = {
    "tests/evaluation/marginal_likelihood/test_batching.py::"
    "test_a_compiled_estimate_equals_the_eager_one": COMPILER,
    "tests/capture/test_capture.py::"
    "test_compiled_steps_equal_eager_steps_and_short_fits_are_not_compiled": COMPILER,
    "tests/capture/test_capture.py::test_a_hundred_compiled_steps_equal_eager_steps": COMPILER,
    "tests/models/test_vae_like.py::"
    "test_steps_are_captured_and_do_not_change_the_buffers": COMPILER,
}
