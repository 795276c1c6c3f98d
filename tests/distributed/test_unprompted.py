"""Models without prompts, in pixels and in latents, do under every launch what they do in one process."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pictures import class_pictures

CASES = Path(__file__).with_name("unprompted_cases.py")
RunOn = Callable[..., list[Any]]
LAUNCHES: dict[str, dict[str, Any]] = {
    "ddp": {"distributed.launch": "ddp"},
    "fsdp": {"distributed.launch": "fsdp"},
    **{f"zero {n}": {"distributed.launch": "zero", "distributed.stage": n} for n in (1, 2, 3)},
}


@pytest.fixture(scope="module")
def alone(
    run_on: RunOn, nano_folder: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], tuple[tuple[str, ...], dict[str, Any]]]:
    """Model -> (its folder, the data, the cache) and what one process does with them."""
    home = tmp_path_factory.mktemp("unprompted")
    class_pictures(home / "data", side=32)
    done: dict[str, tuple[tuple[str, ...], dict[str, Any]]] = {}

    def unlearned(name: str) -> tuple[tuple[str, ...], dict[str, Any]]:
        if name not in done:
            where = (str(nano_folder(name)), str(home / "data"), str(home / "cache"))
            done[name] = where, run_on(1, CASES, "unlearn", *where, {}, widest=2)[0]
        return done[name]

    return unlearned


@pytest.mark.parametrize("launch", list(LAUNCHES))
@pytest.mark.parametrize("name", ["dit", "ddpm_class"])
def test_ranks_take_the_steps_of_one_process(
    run_on: RunOn, alone: Callable[[str], tuple[tuple[str, ...], dict[str, Any]]], name: str, launch: str
) -> None:
    where, expected = alone(name)
    ranks = run_on(2, CASES, "unlearn", *where, LAUNCHES[launch])
    for rank in ranks:
        for report, other in zip(rank["reports"], expected["reports"], strict=True):
            assert report == pytest.approx(other, rel=1e-4, abs=1e-6)
    # Adam moves a weight whose gradient is rounding noise by the learning rate, 1e-3: of all, few do.
    off = torch.cat([(ranks[0]["weights"][key] - value).flatten() for key, value in expected["weights"].items()])
    assert float(off.square().mean().sqrt()) < 2e-5
