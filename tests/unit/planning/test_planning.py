"""Planned memory and FLOPs against real modules, real memory and published counts."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FluxTransformer2DModel, UNet2DConditionModel
from nano import FAMILY_EXAMPLES
from torch.utils.flop_counter import FlopCounterMode

from erasediff.cli import main
from erasediff.config import load_config
from erasediff.errors import UserError
from erasediff.models.trainable import select, train_only
from erasediff.planning import Layout, Network, Pass, StepPlan, Trace, network_of, rank_memory, step_flops, trace
from erasediff.planning.memory import buckets_of
from erasediff.planning.scaling import Cluster, collective_seconds, scaled_step
from erasediff.planning.step_plan import parse_precision, run_precision
from erasediff.workflows.plan import plan

pytestmark = pytest.mark.usefixtures("one_thread")
PUBLISHED = {"sd15": 859_520_964, "sd21": 865_910_724, "sdxl": 2_567_463_684, "flux": 11_901_408_320}
SMALL_UNET = {
    "_class_name": "UNet2DConditionModel",
    "sample_size": 16,
    "block_out_channels": [32, 64],
    "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
    "cross_attention_dim": 32,
    "attention_head_dim": 4,
    "norm_num_groups": 8,
    "layers_per_block": 1,
}

FOUR_LEVELS = {"block_out_channels": [8, 8, 8, 8], "norm_num_groups": 4}


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "small" / "config.json"
    path.parent.mkdir()
    path.write_text(json.dumps(SMALL_UNET))
    return path


@pytest.fixture
def network(config: Path) -> Network:
    return network_of(str(config))


@pytest.fixture(scope="module")
def traced(tmp_path_factory: pytest.TempPathFactory) -> Trace:
    """The small network's pass of one sample, of which all weights are trained."""
    path = tmp_path_factory.mktemp("traced") / "config.json"
    path.write_text(json.dumps(SMALL_UNET))
    return trace(network_of(str(path)), batch_size=1)


@pytest.mark.parametrize("name", PUBLISHED)
def test_known_models_have_their_published_number_of_parameters(name: str) -> None:
    module = network_of(name).module
    assert sum(parameter.numel() for parameter in module.parameters()) == PUBLISHED[name]
    assert all(parameter.is_meta for parameter in module.parameters())


def test_a_model_of_two_sides_is_planned_for_the_longer_one(config: Path) -> None:
    config.write_text(json.dumps({"_class_name": "UNet2DModel", "sample_size": [16, 32], **FOUR_LEVELS}))
    assert network_of(str(config)).resolution == 32


def test_an_adapter_to_be_planned_takes_no_memory(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    planned: list[Network] = []

    def traced(network: Network, **options: Any) -> Trace:
        planned.append(network)
        return trace(network, **options)

    monkeypatch.setattr(sys.modules["erasediff.planning.overview"], "trace", traced)
    settings = {"text_to_image.train": "lora", "text_to_image.lora_rank": 3}
    found = plan(load_config(None, settings), str(config))
    assert all(parameter.is_meta for parameter in planned[0].module.parameters())
    assert 0 < found.parameters_trained < found.parameters


def test_sd15_forward_costs_what_was_published() -> None:
    """SD 1.5's UNet at 512 pixels takes 0.8 TFLOP (402 G multiply-adds), as widely reported."""
    network = network_of("sd15", dtype=torch.bfloat16)
    assert trace(network, batch_size=1).forward_flops == pytest.approx(2 * 402e9, rel=0.01)


@pytest.mark.parametrize("gradient_checkpointing", [False, True])
def test_flops_on_fake_tensors_are_those_of_the_real_pass(network: Network, gradient_checkpointing: bool) -> None:
    traced = trace(network, batch_size=2, gradient_checkpointing=gradient_checkpointing)
    real = UNet2DConditionModel.from_config(SMALL_UNET).train()
    if gradient_checkpointing:
        real.enable_gradient_checkpointing()
    inputs = network.inputs(2, torch.float32, "cpu")
    # Attention in plain matrix products, which torch's counter knows on every device.
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        with FlopCounterMode(display=False) as forward, torch.no_grad():
            real(**inputs)
        with FlopCounterMode(display=False) as both:
            real(**inputs)[0].square().mean().backward()
    assert traced.forward_flops == forward.get_total_flops()
    # Flash attention computes the scores once more in its backward pass.
    assert both.get_total_flops() <= traced.pass_flops <= 1.05 * both.get_total_flops()


def test_activations_are_what_autograd_keeps(network: Network) -> None:
    """The bytes of all distinct storages that a real forward pass saves, parameters aside, are alive at the peak."""
    real = UNet2DConditionModel.from_config(SMALL_UNET).train()
    weights = {parameter.untyped_storage().data_ptr() for parameter in real.parameters()}
    saved: dict[int, int] = {}
    kept = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            saved[storage.data_ptr()] = storage.nbytes()
            kept.append(tensor)
        return tensor

    inputs = network.inputs(4, torch.float32, "cpu")
    given = {tensor.untyped_storage().data_ptr() for tensor in inputs.values() if isinstance(tensor, torch.Tensor)}
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        real(**inputs)
    held = sum(size for pointer, size in saved.items() if pointer not in given)
    traced = trace(network, batch_size=4)
    assert held <= traced.activation_bytes <= 1.25 * held
    less = trace(network, batch_size=4, gradient_checkpointing=True)
    assert less.activation_bytes < 0.7 * traced.activation_bytes


def test_frozen_weights_keep_no_gradient_and_cost_no_flops(network: Network) -> None:
    whole = trace(network, batch_size=2)
    trained = train_only(network.module, select(network.module, "xattn-kv"))
    part = trace(network, batch_size=2)
    assert part.pass_flops < whole.pass_flops
    assert part.forward_flops == whole.forward_flops
    memory = rank_memory(network, Layout(), part)
    assert memory.gradients == 2 * 4 * sum(parameter.numel() for parameter in trained)


def test_sharding_divides_what_each_stage_says(network: Network, traced: Trace) -> None:
    elements = sum(parameter.numel() for parameter in network.module.parameters())
    for ranks in (2, 8):
        zero, one, two, three = (rank_memory(network, Layout(stage=stage, ranks=ranks), traced) for stage in range(4))  # type: ignore[arg-type]
        assert zero.weights == one.weights == two.weights == 4 * elements
        assert three.weights == -(-4 * elements // ranks)
        assert zero.moments == 8 * elements
        assert one.moments == two.moments == three.moments == -(-8 * elements // ranks)
        assert two.gradients == 2 * -(-4 * elements // ranks)
    offloaded = Layout(stage=3, ranks=2, offload_optimizer=True, offload_param=True)
    memory = rank_memory(network, offloaded, traced)
    assert memory.weights == memory.moments == memory.masters == memory.gradients == 0
    assert memory.host == pytest.approx(elements * (4 + 4 + 8 + 8 + 4) / 2, rel=1e-6)


def test_zero_3_holds_the_whole_model_where_both_limits_let_it(network: Network, traced: Trace) -> None:
    elements = sum(parameter.numel() for parameter in network.module.parameters())

    def buffers(live: int, reuse: int) -> int:
        limits = {"stage3_max_live_parameters": live, "stage3_max_reuse_distance": reuse}
        sizes = {"stage3_param_persistence_threshold": 0, "stage3_prefetch_bucket_size": 0, "reduce_bucket_size": 0}
        return rank_memory(network, Layout(stage=3, ranks=2, **sizes, **limits), traced).buffers

    assert buffers(elements, elements) == 4 * elements
    assert buffers(elements - 1, elements) < 4 * elements
    assert buffers(elements, elements - 1) < 4 * elements


RELABEL = StepPlan(
    batch_size=2,
    passes=(
        Pass(data="retain", rows=2),
        Pass(data="forget", rows=2),
        Pass(network="teacher", gradient=False, rows=2, nested=True),
    ),
    teacher=True,
)


def test_a_teacher_adds_a_forward_pass_and_its_weights(network: Network) -> None:
    traced = trace(network, batch_size=2)
    plain = StepPlan(batch_size=2, passes=RELABEL.passes[:2])
    noise, relabel = step_flops(traced, plain), step_flops(traced, RELABEL)
    assert noise.total == noise.fine_tuning
    assert relabel.total == noise.total + traced.forward_flops
    trained = train_only(network.module, select(network.module, "xattn"))
    traced = trace(network, batch_size=2)
    with_teacher, without = (rank_memory(network, Layout(), traced, step) for step in (RELABEL, plain))
    assert with_teacher.teacher == 4 * sum(parameter.numel() for parameter in trained), "the rest is shared"
    # Its pass runs beside the activations that the model has saved.
    assert with_teacher.activations == max(traced.activation_bytes, traced.saved_bytes + traced.forward_bytes)
    assert without.activations == traced.activation_bytes
    assert with_teacher.peak >= without.peak + with_teacher.teacher
    whole = 4 * sum(parameter.numel() for parameter in network.module.parameters())
    partitioned = rank_memory(network, Layout(stage=3, ranks=2), traced, RELABEL)
    assert partitioned.teacher == pytest.approx(whole / 2, abs=4)


def test_state_follows_the_step(network: Network, traced: Trace) -> None:
    """One gradient instead of two, 8-bit moments, an average, and 12 bytes per weight of the method's own."""
    elements = sum(parameter.numel() for parameter in network.module.parameters())
    step = StepPlan(gradients=1, moment_bytes=2, averages=True, state_bytes=12)
    memory = rank_memory(network, Layout(), traced, step)
    assert memory.gradients == memory.averages == 4 * elements
    assert memory.moments == 2 * elements
    assert memory.method == 12 * elements
    accumulating = rank_memory(network, Layout(), traced, StepPlan(accumulation_steps=2))
    assert accumulating.peak >= rank_memory(network, Layout(), traced).peak


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({}, ("fp32", "float32")),
        ({"precision": "bfloat16"}, ("bf16-mixed", "autocast")),
        ({"text_to_image.weights": "bfloat16"}, ("bf16-true", "bfloat16")),
    ],
)
def test_precision_has_one_word_each(settings: dict[str, str], words: tuple[str, str]) -> None:
    assert {parse_precision(word) for word in words} == {run_precision(load_config(None, settings))}


@pytest.mark.parametrize("family", FAMILY_EXAMPLES)
def test_every_family_is_planned_from_its_folder(family: str, nano_folder: Any) -> None:
    network = network_of(str(nano_folder(family)), resolution=32)
    traced = trace(network, batch_size=1)
    assert 2.5 < traced.pass_flops / traced.forward_flops < 3.5


def test_checkpointing_a_transformer_keeps_only_its_blocks_inputs() -> None:
    """Reference cycles of torch's checkpointing must not be taken for memory in use."""
    small = {"num_attention_heads": 2, "attention_head_dim": 16, "axes_dims_rope": (4, 6, 6), "joint_attention_dim": 32}
    with torch.device("meta"):
        module = FluxTransformer2DModel(num_layers=1, num_single_layers=12, pooled_projection_dim=32, **small)
    network = Network(name="flux", module=module, resolution=256)
    whole, less = (trace(network, batch_size=1, gradient_checkpointing=on) for on in (False, True))
    assert less.activation_bytes < 0.35 * whole.activation_bytes


def test_scaling_is_a_roofline_of_the_counts(traced: Trace) -> None:
    trained, cluster = 10**9, Cluster(latency_seconds=0.0)
    ours, plain = (
        scaled_step(traced, trained, 8, cluster, gradients=gradients, samples_per_rank=4) for gradients in (2, 1)
    )
    assert ours.compute == plain.compute == 4 * traced.pass_flops / (989e12 * 0.4)
    assert ours.reduction == 2 * plain.reduction
    # Within one node: seven eighths of two bytes per weight, over NVLink.
    assert plain.gather == pytest.approx(2e9 * 7 / 8 / (450e9 * 0.7))
    # Between four nodes as well: an eighth of it, three quarters of which each GPU sends over its own adapter.
    more = collective_seconds(2 * trained, 32, cluster) - plain.gather
    assert more == pytest.approx(2e9 / 8 * 3 / 4 / (50e9 * 0.8))
    assert collective_seconds(2 * trained, 1, cluster) == 0
    # A gradient that backward passes hide costs nothing; half of one hidden leaves the rest.
    hidden = scaled_step(traced, 1000, 8, cluster, gradients=2, samples_per_rank=4)
    assert hidden.exposed == 0
    assert 0 < ours.exposed < ours.reduction


def test_mistakes_are_told(tmp_path: Path, config: Path) -> None:
    with pytest.raises(UserError, match="multiples of 16"):
        network_of(str(config), resolution=40)
    with pytest.raises(UserError, match="does not exist"):
        network_of("nothing-here")
    (tmp_path / "vae.json").write_text('{"_class_name": "Nothing"}')
    with pytest.raises(UserError, match="not a denoiser"):
        network_of(str(tmp_path / "vae.json"))
    (tmp_path / "zero.json").write_text('{"zero_optimization": {"reduce_bucket_size": "much"}}')
    with pytest.raises(UserError, match="reduce_bucket_size"):
        buckets_of(tmp_path / "zero.json")
    with pytest.raises(UserError, match="no precision"):
        parse_precision("half")
    with pytest.raises(UserError, match="Cannot read the DeepSpeed configuration"):
        buckets_of(tmp_path / "absent.json")


def test_the_command_prints_a_table_and_json(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "zero.json").write_text('{"zero_optimization": {"reduce_bucket_size": 1e6, "overlap_comm": true}}')
    command = ["erasediff", "plan", "--model", str(config), "--ranks", "1,4", "--train", "lora", "--lora-rank", "2"]
    for extra in ([], ["--json", "--target", "relabel", "--deepspeed-config", str(tmp_path / "zero.json")]):
        monkeypatch.setattr(sys, "argv", [*command, *extra])
        with pytest.raises(SystemExit) as ended:
            main()
        assert ended.value.code == 0
        printed = capsys.readouterr().out
        if not extra:
            assert "ZeRO 3, offload" in printed
            assert "24 GB" in printed
            assert "forward + backward of 8 samples" in printed
    planned = json.loads(printed)
    assert [row["ranks"] for row in planned["rows"]] == [1] * 6 + [4] * 6
    assert planned["flops"]["teacher"] > 0
    assert planned["parameters_trained"] < planned["parameters"] / 10
    found = [row["buffers_bytes"] for row in planned["rows"] if row["stage"] == 2]
    trained = 4 * planned["parameters_trained"]
    # Alone; offloaded; among four; and among four offloaded, in DeepSpeed's two buckets of overlap_comm.
    assert found == [0, 2 * 4_000_000, min(trained, 7 * 4_000_000), 2 * 4_000_000]
