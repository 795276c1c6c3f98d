"""Table of DeepSpeed's undocumented names that this package uses: where each is defined, used and tested.

``TRIED`` in ``zero.engine`` holds the versions that were tried. For another version: run the unit test of this table,
which tells what is gone, then the tests that the table names.
"""

from __future__ import annotations

from typing import NamedTuple

LAYOUTS = "test_gradients_layouts.py::test_every_layout_unlearns_as_one_process_does"
FAILED = "test_failed_steps.py::test_a_failed_step_that_is_tried_again_is_the_step_it_would_have_been"
SHARDS = "test_gradients_state.py::test_shards_have_each_element_once_and_equal_those_of_one_process"
ONCE = "test_gradients_state.py::test_both_gradients_are_of_weights_gathered_once_where_a_pass_may_keep_them"
HOOKS = "test_gradients_state.py::test_only_deepspeeds_hooks_rest_while_all_weights_are_whole"
AUTOCAST = "test_gradients_state.py::test_autocast_holds_within_an_engine_that_would_turn_it_off"
NORM = "test_gradients_state.py::test_the_engine_tells_the_norm_of_the_combination"
REFUSED = "test_gradients_state.py::test_what_cannot_work_is_refused_with_what_to_do"
BETWEEN = "test_gradients_state.py::test_the_engine_is_still_the_users_between_steps"
AVERAGED = "test_gradients_state.py::test_without_sharding_gradients_are_averaged_in_buckets"
MASTERS = "test_gradients_state.py::test_bf16_weights_are_roundings_of_fp32_masters"
PARTS = "test_gradients_state.py::test_a_model_is_partitioned_as_it_is_made"

ENGINE = "runtime/engine.py"
BASE = "runtime/base_optimizer.py"
STAGE_1_2 = "runtime/zero/stage_1_and_2.py"
STAGE_3 = "runtime/zero/stage3.py"
OFFLOAD = "runtime/zero/parameter_offload.py"
COORDINATOR = "runtime/zero/partitioned_param_coordinator.py"
PARAMETERS = "runtime/zero/partition_parameters.py"


class PrivateName(NamedTuple):
    """One undocumented name: the file of DeepSpeed that defines it, ours that use it, and its test."""

    name: str
    defined_in: str
    used_in: str
    test: str


PRIVATE_NAMES = tuple(
    PrivateName(name, defined_in, used_in, test)
    for defined_in, used_in, test, names in (
        (BASE, "layout", FAILED, "_backward_active_depth clear_backward_seen_flag"),
        (BASE, "layout", LAYOUTS, "_epilogue_ran_this_backward"),
        (COORDINATOR, "stage3", FAILED, "_invalidate_trace is_record_trace"),
        (COORDINATOR, "stage3_gather", ONCE, "_PartitionedParameterCoordinator__param_order is_complete_trace"),
        (ENGINE, "engine", AUTOCAST, "torch_autocast_dtype torch_autocast_enabled"),
        (ENGINE, "engine", BETWEEN, "_config _is_gradient_accumulation_boundary"),
        (ENGINE, "engine", FAILED, "timers"),
        (ENGINE, "engine", NORM, "_global_grad_norm"),
        (
            ENGINE,
            "engine",
            REFUSED,
            "dp_world_size fp16_enabled has_moe_layers is_deepcompile_enabled pipeline_parallelism "
            "super_offload torch_autocast_z0_gradscaler zero_hpz_partition_size",
        ),
        (ENGINE, "gradients", LAYOUTS, "basic_optimizer"),
        (ENGINE, "stage0", AVERAGED, "buffered_allreduce_fallback communication_data_type"),
        (ENGINE, "stage0 stage1_2", AVERAGED, "gradient_average"),
        (OFFLOAD, "engine", PARTS, "_convert_to_zero_parameters"),
        (OFFLOAD, "stage3", FAILED, "release_backward_leftovers"),
        (OFFLOAD, "stage3 stage3_gather", LAYOUTS, "get_param_coordinator"),
        (OFFLOAD, "stage3_gather", HOOKS, "backward_hooks forward_hooks"),
        (
            OFFLOAD,
            "stage3_gather",
            ONCE,
            "_max_available_parameters_in_numel _max_reuse_distance_in_numel _prefetch_bucket_sz "
            "zero_quantized_nontrainable_weights zero_quantized_weights",
        ),
        (PARAMETERS, "engine partition stage3", REFUSED, "ds_id"),
        (PARAMETERS, "partition stage3 stage3_gather", PARTS, "ds_numel"),
        (PARAMETERS, "stage3", LAYOUTS, "all_gather partition_numel"),
        (PARAMETERS, "stage3_gather", HOOKS, "InsertPostInitMethodToModuleSubClasses linear_bk"),
        (
            PARAMETERS,
            "stage3_gather",
            ONCE,
            "all_gather_coalesced ds_active_sub_modules ds_external_parameters ds_status",
        ),
        (STAGE_1_2, "engine", BETWEEN, "clip_grad"),
        (STAGE_1_2, "engine", REFUSED, "torch_autocast_gradscaler zenflow"),
        (STAGE_1_2, "gradients", LAYOUTS, "DeepSpeedZeroOptimizer"),
        (STAGE_1_2, "layout", FAILED, "params_already_reduced"),
        (
            STAGE_1_2,
            "layout",
            LAYOUTS,
            "autoep_folding_tp_group gradient_predivide_factor independent_gradient_partition_epilogue "
            "postscale_gradients sequence_parallel_size",
        ),
        (STAGE_1_2, "layout stage1_2", LAYOUTS, "averaged_gradients"),
        (STAGE_1_2, "layout stage1_2 stage3", LAYOUTS, "ipg_buckets"),
        (STAGE_1_2, "stage1_2", BETWEEN, "check_grad_overflow compute_grad_norm"),
        (
            STAGE_1_2,
            "stage1_2",
            FAILED,
            "_clear_previous_reduced_grads extra_large_param_to_reduce grads_in_partition ready_for_gradients",
        ),
        (
            STAGE_1_2,
            "stage1_2",
            LAYOUTS,
            "_fill_param_grad_accum_attribute _is_muon_group _wait_for_offload_copies all_grad_tensors "
            "bit16_groups clear_grad_attribute cpu_offload cpu_offload_pin_memory "
            "get_gradient_for_reduction grad_partition_insertion_offset gradient_accumulation_dtype "
            "micro_step_id param_to_partition_ids partition_gradients partition_size process_gradients "
            "real_dp_process_group single_partition_of_fp32_groups update_lp_params "
            "use_grad_accum_attribute",
        ),
        (STAGE_1_2, "stage1_2", SHARDS, "grad_start_offset params_in_partition"),
        (
            STAGE_1_2,
            "stage1_2 stage3",
            LAYOUTS,
            "dp_process_group get_param_id reduce_bucket_size reduce_ready_partitions_and_remove_grads",
        ),
        (STAGE_3, "gradients", LAYOUTS, "DeepSpeedZeroOptimizer_Stage3"),
        (STAGE_3, "stage0 stage3", AVERAGED, "fp16_groups"),
        (STAGE_3, "stage3", BETWEEN, "_get_norm_groups"),
        (STAGE_3, "stage3", FAILED, "clear_params"),
        (
            STAGE_3,
            "stage3",
            LAYOUTS,
            "_DeepSpeedZeroOptimizer_Stage3__param_id_to_grad_partition _get_param_partition_group "
            "_gradient_averaging_world_size _partition_all_parameters "
            "_reassign_or_swap_out_partitioned_parameters all2all_process_group "
            "fp32_partitioned_groups_flat grad_partitions_flat_buffer offload_optimizer_pin_memory "
            "parameter_offload persistent_parameters sub_group_to_group_id use_muon",
        ),
        (STAGE_3, "stage3", SHARDS, "_get_param_partition_rank grad_position"),
    )
    for name in names.split()
)
