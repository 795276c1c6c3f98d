"""LoRA files of other programs: merged as those merge them, or refused by the first key that is not applied."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict, inject_adapter_in_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from erasediff.errors import UserError
from erasediff.models import lora

pytestmark = pytest.mark.usefixtures("one_thread")
KINDS: dict[str, dict[str, Any]] = {
    "plain": {"r": 4, "lora_alpha": 8},
    "alpha_pattern": {"r": 4, "lora_alpha": 8, "alpha_pattern": {"to_q": 32, "inner.to_k": 1}},
    "rank_pattern": {"r": 4, "lora_alpha": 8, "rank_pattern": {"conv": 2, r"inner\.to_.": 3}},
    "rslora": {"r": 4, "lora_alpha": 8, "use_rslora": True, "rank_pattern": {"conv": 2}},
    "dora": {"r": 4, "lora_alpha": 8, "use_dora": True},
    "dora_rslora": {"r": 4, "lora_alpha": 8, "use_dora": True, "use_rslora": True, "alpha_pattern": {"conv": 3}},
    "bias": {"r": 4, "lora_alpha": 8, "lora_bias": True},
}


class Network(nn.Module):
    """Names that end alike: ``to_q`` is not ``inner.to_q``."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        self.to_q = nn.Linear(8, 8)
        self.inner = nn.ModuleDict({"to_q": nn.Linear(8, 8), "to_k": nn.Linear(8, 6), "to_out": nn.Linear(8, 8)})

    def forward(self, x: Tensor) -> Tensor:
        return self.to_q(self.conv(x).flatten(2).transpose(1, 2))


def network() -> Network:
    torch.manual_seed(0)
    return Network()


def randomised(module: nn.Module) -> None:
    """Adapters as after training: none of their parts is zero, or one."""
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.rand_like(parameter) * 0.5 + 0.1)


def saved_by_peft(folder: Path, **options: Any) -> dict[str, Tensor]:
    """A folder with a trained adapter, and the weights that peft itself merges it to."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = LoraConfig(target_modules=["conv", "to_q", "to_k"], **options)
        model = get_peft_model(network(), config)
        randomised(model)
        model.save_pretrained(folder)
        merged: dict[str, Tensor] = model.merge_and_unload().state_dict()
    return merged


def merged_here(path: Path, family: str = "sd") -> dict[str, Tensor]:
    module = network()
    parameters = lora.load(module, path, family=family)
    assert all(parameter.dtype == torch.float32 and parameter.requires_grad for parameter in parameters)
    trained = {id(parameter) for parameter in module.parameters() if parameter.requires_grad}
    assert {id(parameter) for parameter in parameters} == trained
    lora.merge(module)
    return module.state_dict()


def assert_merged(own: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert own.keys() == expected.keys()
    base = network().state_dict()
    assert any(not torch.equal(expected[name], base[name]) for name in base)
    for name, value in expected.items():
        torch.testing.assert_close(own[name], value, rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_files_of_peft(kind: str, tmp_path: Path) -> None:
    expected = saved_by_peft(tmp_path, **KINDS[kind])
    assert_merged(merged_here(tmp_path / "adapter_model.safetensors"), expected)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("family", "prefix"), [("sd", "unet"), ("flux", "transformer")])
def test_files_of_diffusers_with_metadata(kind: str, family: str, prefix: str, tmp_path: Path) -> None:
    """Files written by ``save_lora_weights(unet_lora_adapter_metadata=...)``."""
    expected = saved_by_peft(tmp_path, **KINDS[kind])
    tensors = {
        key.replace("base_model.model", prefix): value
        for key, value in load_file(tmp_path / "adapter_model.safetensors").items()
    }
    settings = json.loads((tmp_path / "adapter_config.json").read_text())
    metadata = {"lora_adapter_metadata": json.dumps({f"{prefix}.{key}": value for key, value in settings.items()})}
    save_file(tensors, tmp_path / "x.safetensors", metadata)
    assert_merged(merged_here(tmp_path / "x.safetensors", family), expected)


@pytest.mark.parametrize("kind", ["alpha_pattern", "rslora"])
def test_diffusers_own_file_of_a_unet(kind: str, nano: Any, nano_folder: Callable[[str], Path], tmp_path: Path) -> None:
    pipeline: Any = nano.sd()
    unet = pipeline.unet
    state = {name: value.clone() for name, value in unet.state_dict().items()}
    settings = {**KINDS[kind], "rank_pattern": {}, "alpha_pattern": {"attn2.to_k": 1}}
    inject_adapter_in_model(LoraConfig(target_modules=["to_q", "to_k"], **settings), unet, "default")
    randomised(unet)
    metadata = {"r": 4, "lora_alpha": 8, "target_modules": ["to_q", "to_k"], "alpha_pattern": {"attn2.to_k": 1}}
    metadata["use_rslora"] = settings.get("use_rslora", False)
    type(pipeline).save_lora_weights(
        tmp_path,
        unet_lora_layers=get_peft_model_state_dict(unet, adapter_name="default", state_dict=unet.state_dict()),
        unet_lora_adapter_metadata=metadata,
    )
    lora.merge(unet)  # by peft's own layers
    own = nano.sd().unet
    own.load_state_dict(state)
    lora.load(own, next(tmp_path.glob("*.safetensors")), family="sd")
    lora.merge(own)
    for name, value in unet.state_dict().items():
        torch.testing.assert_close(own.state_dict()[name], value, rtol=0, atol=1e-6)


def halves(layer: nn.Module, rank: int) -> tuple[Tensor, Tensor]:
    weight: Any = layer.weight
    return torch.randn(rank, *weight.shape[1:]), torch.randn(weight.shape[0], rank, *[1] * (weight.ndim - 2))


@pytest.mark.parametrize("dora", [False, True])
def test_files_of_kohya_with_an_alpha_for_each_layer(dora: bool, tmp_path: Path) -> None:
    module = network()
    expected = {name: value.clone() for name, value in module.state_dict().items()}
    tensors = {}
    for name, rank, alpha in (("conv", 2, 1.0), ("to_q", 3, 6.0), ("inner.to_k", 4, 0.5)):
        layer = module.get_submodule(name)
        down, up = halves(layer, rank)
        key = f"lora_unet_{name.replace('.', '_')}"
        tensors |= {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up}
        tensors[f"{key}.alpha"] = torch.tensor(alpha)
        weight = expected[f"{name}.weight"]
        weight += alpha / rank * (up.flatten(1) @ down.flatten(1)).reshape(weight.shape)
        if dora:
            magnitude = torch.rand(len(weight), *[1] * (weight.ndim - 1)) + 0.5
            tensors[f"{key}.dora_scale"] = magnitude
            weight *= magnitude / weight.flatten(1).norm(dim=1).reshape(magnitude.shape)
    save_file(tensors, tmp_path / "x.safetensors")
    assert_merged(merged_here(tmp_path / "x.safetensors"), expected)


def test_an_adapter_is_for_the_layer_of_exactly_its_name(tmp_path: Path) -> None:
    """peft takes a plain name for the end of names: ``to_q`` would adapt ``inner.to_q`` too, with its rank."""
    down, up = halves(nn.Linear(8, 8), 2)
    tensors = {"unet.to_q.lora_A.weight": down, "unet.to_q.lora_B.weight": up}
    save_file(tensors, tmp_path / "x.safetensors")
    expected = network().state_dict()
    expected["to_q.weight"] += up @ down
    assert_merged(merged_here(tmp_path / "x.safetensors"), expected)


@pytest.mark.parametrize(
    ("key", "tensor"),
    [
        ("unet.to_q.oft_blocks", torch.zeros(2, 4, 4)),
        ("unet.to_q.b1.weight", torch.zeros(8, 2)),
        ("unet.to_k.lora_B.bias", torch.zeros(8)),
        ("unet.inner.to_q.lora_magnitude_vector", torch.zeros(8)),
        ("unet.time.alpha", torch.tensor(1.0)),
    ],
)
def test_a_key_that_is_not_applied_is_named(key: str, tensor: Tensor, tmp_path: Path) -> None:
    down, up = halves(nn.Linear(8, 8), 2)
    save_file({"unet.to_q.lora_A.weight": down, "unet.to_q.lora_B.weight": up, key: tensor}, tmp_path / "x.safetensors")
    with pytest.raises(UserError, match=f"holds {re.escape(key)}, which cannot be applied here: merge the LoRA"):
        lora.load(network(), tmp_path / "x.safetensors", family="sd")


def refused(path: Path, match: str) -> None:
    module = network()
    with pytest.raises(UserError, match=match):
        lora.load(module, path, family="sd")
    assert not any("lora" in name for name, _ in module.named_parameters())


def test_files_that_contradict_themselves(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    down, up = halves(nn.Linear(8, 8), 2)
    plain = {"unet.to_q.lora_A.weight": down, "unet.to_q.lora_B.weight": up}

    def write(tensors: dict[str, Tensor], **settings: Any) -> None:
        prefixed = {f"unet.{key}": value for key, value in settings.items()}
        save_file(tensors, path, {"lora_adapter_metadata": json.dumps(prefixed)} if settings else None)

    write({**plain, "unet.to_q.alpha": torch.tensor(3.0)}, r=2, lora_alpha=4)
    refused(path, "contradicts itself: unet.to_q.alpha is 3, its settings make it 4")
    write(plain, r=3, lora_alpha=4)
    refused(path, "its settings give to_q the rank 3, its weights 2")
    write(plain, r=2, lora_alpha=4, use_dora=True)
    refused(path, "is a DoRA, and to_q lacks its magnitudes")
    write({**plain, "unet.to_q.lora_magnitude_vector": torch.ones(1, 8)})
    refused(path, r"a vector of unet.to_q is \[1, 8\], not one value for each of its 8 outputs")
    write(plain, r=2, lora_alpha="big")
    refused(path, "its settings give to_q no number by alpha_pattern")
    write(plain, r=2, lora_alpha=4, rank_pattern={"(": 2})
    refused(path, "its settings give to_q no number by rank_pattern")
    write(plain, r=2, lora_alpha=4, init_lora_weights="pissa_niter_4")
    refused(path, "was trained with init_lora_weights='pissa_niter_4'")
    write(plain, r=2, lora_alpha=4, alora_invocation_tokens=[1])
    refused(path, "was trained with alora_invocation_tokens=")
    save_file(plain, path, {"lora_adapter_metadata": "{"})
    refused(path, "its lora_adapter_metadata is no JSON object")


def test_peft_file_without_its_configuration(tmp_path: Path) -> None:
    saved_by_peft(tmp_path, **KINDS["plain"])
    (tmp_path / "adapter_config.json").unlink()
    refused(tmp_path / "adapter_model.safetensors", "scale is in adapter_config.json: put that file beside it")


def test_bias_for_a_layer_without_one(tmp_path: Path) -> None:
    down, up = halves(nn.Linear(8, 8), 2)
    tensors = {"to_q.lora_A.weight": down, "to_q.lora_B.weight": up, "to_q.lora_B.bias": torch.ones(8)}
    save_file(tensors, tmp_path / "x.safetensors")
    module = network()
    module.to_q = nn.Linear(8, 8, bias=False)
    with pytest.raises(UserError, match="adds to the bias of to_q, which has none"):
        lora.load(module, tmp_path / "x.safetensors", family="sd")


@pytest.mark.parametrize("kind", ["dora", "bias"])
def test_dora_and_biases_are_not_saved_as_plain_adapters(kind: str, tmp_path: Path) -> None:
    saved_by_peft(tmp_path, **KINDS[kind])
    module = network()
    lora.load(module, tmp_path / "adapter_model.safetensors", family="sd")
    with pytest.raises(ValueError, match="has no keys here: merge it"):
        lora.save(module, tmp_path / "y.safetensors", family="sd")


@pytest.mark.timeout(20)
@pytest.mark.parametrize(
    "settings",
    [
        {"r": 2, "lora_alpha": "nan"},
        {"r": 2, "lora_alpha": "4"},
        {"r": 2, "lora_alpha": True},
        {"r": 2, "lora_alpha": [4]},
        {"r": 2, "lora_alpha": 4, "alpha_pattern": ["to_q"]},
        {"r": 2, "lora_alpha": 4, "alpha_pattern": {"(.*)*(.*)*x": 4}},
        {"r": 2, "lora_alpha": 4, "rank_pattern": {".*.*.*.*.*.*x": 4}},
        {"r": 2, "lora_alpha": 4, "rank_pattern": {"a" * 10**6: 4}},
    ],
)
def test_settings_that_give_no_number(tmp_path: Path, settings: dict[str, Any]) -> None:
    down, up = halves(nn.Linear(8, 8), 2)
    recorded = {"lora_adapter_metadata": json.dumps({f"unet.{key}": value for key, value in settings.items()})}
    path = tmp_path / "x.safetensors"
    save_file({"unet.to_q.lora_A.weight": down, "unet.to_q.lora_B.weight": up}, path, recorded)
    refused(path, "its settings give to_q no number by")


@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16, torch.int64, torch.bool])
def test_factors_of_whole_numbers(tmp_path: Path, dtype: torch.dtype) -> None:
    down, up = halves(nn.Linear(8, 8), 2)
    path = tmp_path / "x.safetensors"
    save_file({"to_q.lora_A.weight": torch.ones_like(down).to(dtype), "to_q.lora_B.weight": up}, path)
    refused(path, "holds to_q.lora_A.weight as torch.*, not as floating point")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("key", ["to_q.lora_A.weight", "to_q.lora_B.weight", "to_q.alpha"])
def test_values_that_are_not_finite_are_named(tmp_path: Path, key: str, value: float) -> None:
    down, up = halves(nn.Linear(8, 8), 2)
    tensors = {"to_q.lora_A.weight": down, "to_q.lora_B.weight": up, "to_q.alpha": torch.tensor(2.0)}
    tensors[key] = torch.full_like(tensors[key], value)
    save_file(tensors, tmp_path / "x.safetensors")
    refused(tmp_path / "x.safetensors", f"holds values that are not finite, in {key}")
