"""Tests that ``pytest --pretend-gpu`` does not run, each with its reason.

A key is a test's file and name, without parameters; tests/test_pretend_run.py checks that each is
there, and that they are few.
"""

BACKGROUND = "the compiler in the background is for steps on a CPU only"
COMPILER = "a pretended accelerator has no compiler"
CHECK_READS = "the check reads the index, and is made on the CPU only"
CPU_PRODUCTS = "products by oneDNN are a choice for the CPU"
OTHER_REASON = "steps on a device that is written in Python cannot be captured for another reason"
OWN_DEVICES = "it mixes devices itself, by tensors that the option would move"
READINGS = "it needs the objective of each step, which is read after 50 steps on an accelerator"
STATES_CPU = "it states that results are on the CPU"
ON_THE_CPU = "its x stays on the CPU, and the option moves the modules that it makes"
REFERENCE = "its reference mixes the fit with tensors of the CPU"
STORAGE = "torch stores tensors of a device that is written in Python as those of the CPU"
NESTED = "a device that is written in Python has no nested tensors"
SPARSE = "a device that is written in Python has no sparse tensors"
THREADS = "torch differentiates on a device that is written in Python in one thread only"

EXCEPTIONS = {
    "tests/evaluation/marginal_likelihood/test_batching.py::"
    "test_a_compiled_estimate_equals_the_eager_one": COMPILER,
    "tests/evaluation/marginal_likelihood/test_batching.py::"
    "test_both_matrix_products_give_the_same_result": CPU_PRODUCTS,
    "tests/evaluation/marginal_likelihood/test_batching.py::"
    "test_auto_captures_long_fits_and_estimates": BACKGROUND,
    "tests/capture/test_background.py::"
    "test_a_fit_that_ends_first_abandons_the_compiler": BACKGROUND,
    "tests/capture/test_background.py::test_an_interrupted_fit_abandons_the_compiler": BACKGROUND,
    "tests/capture/test_background.py::"
    "test_a_compiler_that_fails_leaves_a_recorded_fit": BACKGROUND,
    "tests/capture/test_background.py::"
    "test_an_evaluation_that_ends_first_abandons_the_compiler": BACKGROUND,
    "tests/capture/test_background.py::"
    "test_a_fit_that_was_compiled_in_background_resumes_bit_for_bit": BACKGROUND,
    "tests/capture/test_capture.py::"
    "test_compiled_steps_equal_eager_steps_and_short_fits_are_not_compiled": COMPILER,
    "tests/capture/test_capture.py::test_a_hundred_compiled_steps_equal_eager_steps": COMPILER,
    "tests/capture/test_capture.py::"
    "test_steps_that_cannot_be_captured_run_eagerly_with_the_reason": OTHER_REASON,
    "tests/models/test_vae_like.py::"
    "test_steps_are_captured_and_do_not_change_the_buffers": COMPILER,
    "tests/core/devices/test_device_mix.py::"
    "test_the_line_that_made_the_tensor_is_named": OWN_DEVICES,
    "tests/core/devices/test_device_mix.py::test_a_variable_of_the_module_is_named": OWN_DEVICES,
    "tests/core/devices/test_device_mix.py::"
    "test_an_array_of_numpy_is_named_where_it_is_used": OWN_DEVICES,
    "tests/guides/test_guides.py::test_an_index_out_of_range_raises": CHECK_READS,
    "tests/core/test_nonfinite.py::test_a_minibatch_names_the_row_of_the_whole_data": READINGS,
    "tests/inference/svi/test_svi.py::"
    "test_a_loss_that_becomes_nan_stops_the_fit_with_step_and_site": READINGS,
    "tests/inference/svi/checkpoints/test_checkpoint.py::"
    "test_the_execution_is_kept_unless_another_is_requested": READINGS,
    "tests/inference/svi/steps/test_recorded_fits.py::test_auto_records_a_long_fit": READINGS,
    "tests/core/test_program.py::test_the_dtype_of_any_pair_is_found_or_left_open": STATES_CPU,
    "tests/core/test_threads.py::test_an_error_lets_other_threads_go_on": STATES_CPU,
    "tests/inference/svi/batches/test_epoch_transform.py::"
    "test_transformed_data_are_checked": STATES_CPU,
    "tests/inference/svi/test_tolerance.py::"
    "test_stages_that_met_their_tolerance_are_that_close_to_theory": REFERENCE,
    "tests/core/test_program.py::test_a_copy_of_a_trained_model_trains_alone": STORAGE,
    "tests/core/arrays/test_frames.py::"
    "test_sparse_matrices_are_converted_with_a_warning_or_refused_with_their_size": SPARSE,
    "tests/interop/test_boundary.py::"
    "test_tensors_and_frames_that_are_no_tables_are_refused_by_name": NESTED,
    "tests/core/test_threads.py::test_each_thread_has_the_result_that_it_has_alone": THREADS,
    "tests/models/test_autoencoder.py::test_a_user_written_flat_prior_is_refused": OWN_DEVICES,
    "tests/models/test_supervised.py::"
    "test_models_without_their_own_encoder_are_refused": ON_THE_CPU,
}
