"""Saved state comes back bit for bit, and a damaged file is one sentence."""

import hashlib
import math
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from erasediff.errors import UserError
from erasediff.io.state_file import HostState, load_state, save_state
from erasediff.io.tensor_file import DTYPES


def round_trip(state: Any, folder: Path) -> Any:
    save_state(state, folder / "state.safetensors")
    return load_state(folder / "state.safetensors")


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    a_bytes, b_bytes = (tensor.contiguous().reshape(-1).view(torch.uint8) for tensor in (a, b))
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a_bytes, b_bytes)


@pytest.mark.parametrize(
    "dtype",
    [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.uint8, torch.bool],
)
@pytest.mark.parametrize("shape", [(), (0,), (0, 3), (7,), (3, 5)])
def test_tensors(tmp_path: Path, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    tensor = (torch.randn(shape) * 10).to(dtype)
    assert same_bits(round_trip({"x": tensor}, tmp_path)["x"], tensor)


def test_special_floats(tmp_path: Path) -> None:
    tensor = torch.tensor([math.nan, math.inf, -math.inf, -0.0, 1e-45])
    assert same_bits(round_trip(tensor, tmp_path), tensor)
    floats = [0.1 + 0.2, -0.0, 5e-324, math.inf, -math.inf, math.nan]
    back = round_trip(floats, tmp_path)
    assert [struct.pack("<d", value) for value in back] == [struct.pack("<d", value) for value in floats]


def test_plain_values_keep_their_kinds(tmp_path: Path) -> None:
    state: dict[str, Any] = {
        "none": None,
        "bools": [True, False],
        "big": 2**100,
        "betas": (0.9, 0.999),
        "by number": {0: "a", 1: {"x": ()}},
        "$odd": {"$tensor": "not one"},
        "text": 'é"\n',
        "empty": {"list": [], "dict": {}},
    }
    back = round_trip(state, tmp_path)
    assert back == state
    assert type(back["betas"]) is tuple
    assert type(back["bools"][0]) is bool


def test_equal_states_are_equal_files(tmp_path: Path) -> None:
    a, b = torch.randn(3), torch.randn(2)
    save_state({"a": a, "b": {"c": 1, "d": b}}, tmp_path / "one")
    save_state({"b": {"d": b.clone(), "c": 1}, "a": a.clone()}, tmp_path / "other")
    assert (tmp_path / "one").read_bytes() == (tmp_path / "other").read_bytes()


def test_a_tensor_met_twice_stays_one(tmp_path: Path) -> None:
    shared = torch.randn(4)
    back = round_trip([shared, {"again": shared}], tmp_path)
    assert back[0] is back[1]["again"]


def test_views_of_one_memory_are_saved_apart(tmp_path: Path) -> None:
    base = torch.randn(4, 6)
    state = [base, base[1:3], base.t(), base.view(-1), torch.ones(1).expand(3), base.view(torch.int32)]
    back = round_trip(state, tmp_path)
    assert all(same_bits(a, b) for a, b in zip(back, state, strict=True))


def test_files_are_byte_for_byte_those_of_safetensors_and_their_hash_is_returned(tmp_path: Path) -> None:
    numbers = torch.arange(24).reshape(4, 6)
    state = {
        "text": '\u00e9\u2028"\\\n\x7f',
        "tensors": [numbers.to(dtype) for dtype in DTYPES.values()],
        "views": [numbers.t(), numbers[1:3], torch.ones(()), torch.ones(0, 3), torch.ones(3, dtype=torch.int8)],
        "many": [torch.full((1,), float(number)) for number in range(12)],
    }
    digest = save_state(state, tmp_path / "ours")
    with safe_open(tmp_path / "ours", framework="pt") as file:
        metadata = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    save_file(tensors, tmp_path / "theirs", metadata=metadata)
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()
    assert digest == hashlib.sha256((tmp_path / "ours").read_bytes()).hexdigest()


def test_a_copied_state_is_that_of_the_moment(tmp_path: Path) -> None:
    weight = torch.randn(3, 4)
    state = {"weight": weight, "again": weight, "part": weight[1:], "count": [0]}
    save_state(state, tmp_path / "before")
    copied = HostState.copy_of(state)
    weight.zero_()
    state["count"][0] = 1  # type: ignore[index]
    copied.save(tmp_path / "after")
    assert (tmp_path / "before").read_bytes() == (tmp_path / "after").read_bytes()


def test_an_optimizer_goes_on_as_if_it_had_not_stopped(tmp_path: Path) -> None:
    def trained(steps: int, stop_after: int | None) -> list[torch.Tensor]:
        torch.manual_seed(0)
        model = torch.nn.Linear(5, 3)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
        for step in range(steps):
            if step == stop_after:
                back = round_trip({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path)
                model = torch.nn.Linear(5, 3)
                optimizer = torch.optim.AdamW(model.parameters(), lr=7.0)
                model.load_state_dict(back["model"])
                optimizer.load_state_dict(back["optimizer"])
            model(torch.full((2, 5), step + 1.0)).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        return [parameter.detach() for parameter in model.parameters()]

    assert all(same_bits(a, b) for a, b in zip(trained(6, 3), trained(6, None), strict=True))


def test_other_kinds_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not set"):
        save_state({"x": {1, 2}}, tmp_path / "state.safetensors")


@pytest.mark.parametrize("damage", ["truncated", "emptied", "removed", "header"])
def test_a_damaged_file_is_one_sentence(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "state.safetensors"
    save_state({"x": torch.randn(100)}, path)
    whole = path.read_bytes()
    if damage == "removed":
        path.unlink()
    else:
        path.write_bytes({"truncated": whole[:-9], "emptied": b"", "header": b"\xff" * 16 + whole[16:]}[damage])
    with pytest.raises(UserError, match="cannot be read") as caught:
        load_state(path)
    assert "\n" not in str(caught.value)


def test_another_programs_file_is_refused(tmp_path: Path) -> None:
    save_file({"x": torch.ones(1)}, tmp_path / "other.safetensors")
    with pytest.raises(UserError, match="not a saved state"):
        load_state(tmp_path / "other.safetensors")


@pytest.mark.parametrize(
    "tree",
    ["", "{", "NaN", "[" * 10**5, '{"$tensor": "x"}', '{"$tensor": []}', '{"$items": 5}', '{"$items": [[[], 1]]}'],
)
def test_a_tree_that_is_none_of_ours(tree: str, tmp_path: Path) -> None:
    path = tmp_path / "state.safetensors"
    save_file({"000000": torch.zeros(1)}, path, {"erasediff-state-1": tree})
    with pytest.raises(UserError, match=r"state\.safetensors is damaged: its description of the state cannot be read"):
        load_state(path)
