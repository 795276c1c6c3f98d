"""A text-to-image run under ZeRO-3 reads its checkpoint in parts, and its frozen teacher too; what cannot be run."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

CASES = Path(__file__).with_name("session_cases.py")
RunOn = Callable[..., list[Any]]
ZERO_3 = {"distributed.launch": "zero", "distributed.stage": 3}


@pytest.mark.parametrize("train", ["full", pytest.param("lora", marks=pytest.mark.slow)])
def test_no_rank_holds_the_denoiser_or_its_teacher_whole(
    run_on: RunOn, nano_folder: Callable[[str], Path], tmp_path: Path, train: str
) -> None:
    where, chosen = (str(nano_folder("sd")), str(tmp_path)), {"text_to_image.train": train}
    alone = run_on(1, CASES, "unlearn", *where, chosen, widest=2)[0]
    ranks = run_on(2, CASES, "unlearn", *where, {**chosen, **ZERO_3})
    for rank in ranks:
        assert rank["cuts"] > 200
        assert rank["most"] < 0.2 * rank["total"]
        for report, expected in zip(rank["reports"], alone["reports"], strict=True):
            assert report == pytest.approx(expected, rel=1e-4, abs=1e-7)
    # Adam moves a weight whose gradient is rounding noise by the learning rate, 1e-3: of all, few do.
    off = torch.cat([(ranks[0]["weights"][name] - weight).flatten() for name, weight in alone["weights"].items()])
    assert float(off.square().mean().sqrt()) < 1e-5
    assert float(off.abs().max()) < 1e-3


def test_a_teacher_is_cut_under_fsdp_too(run_on: RunOn, nano_folder: Callable[[str], Path], tmp_path: Path) -> None:
    where = (str(nano_folder("sd")), str(tmp_path))
    alone = run_on(1, CASES, "unlearn", *where, {}, widest=2)[0]
    for rank in run_on(2, CASES, "unlearn", *where, {"distributed.launch": "fsdp"}):
        for report, expected in zip(rank["reports"], alone["reports"], strict=True):
            assert report == pytest.approx(expected, rel=1e-4, abs=1e-7)


def test_a_deepspeed_configuration_that_cannot_be_used_is_one_sentence(run_on: RunOn, tmp_path: Path) -> None:
    """Its own reader's errors, those of the engine that it would be, and ours."""
    refused = {
        "reduce_bucket_sizes: Extra inputs are not permitted": {"zero_optimization": {"reduce_bucket_sizes": 5}},
        "offload_optimizer.device: Input should be": {"zero_optimization": {"offload_optimizer": {"device": "tape"}}},
        "'int' object has no attribute 'get'": {"data_types": 5},
        "'fp8' is not a valid DtypeEnum": {"data_types": {"grad_accum_dtype": "fp8"}},
        "gradient_predivide_factor != 1.0 is not yet supported": {"gradient_predivide_factor": 2.0},
        "float16 with loss scaling: use bf16": {"torch_autocast": {"enabled": True, "dtype": "float16"}},
    }
    paths = []
    for number, own in enumerate(refused.values()):
        paths.append(str(tmp_path / f"own-{number}.json"))
        Path(paths[-1]).write_text(json.dumps(own))
    said = run_on(1, CASES, "refusals", paths)[0]
    for sentence, path, message in zip(refused, paths, said, strict=True):
        assert message.startswith(f"{path} cannot be used: "), message
        assert sentence in message
        assert message.endswith(".")
        assert "\n" not in message
