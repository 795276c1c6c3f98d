"""A person's own DeepSpeed configuration: what it says holds, what it leaves open is the run's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from erasediff.config import load_config
from erasediff.errors import UserError
from erasediff.parallel.zero.config import zero_config, zero_stage


def built(tmp_path: Path, own: dict[str, Any], **asked: Any) -> dict[str, Any]:
    path = tmp_path / "own.json"
    path.write_text(json.dumps(own))
    given = {"distributed.launch": "zero", "distributed.deepspeed_config": path}
    settings = load_config(None, given | {f"distributed.{name}": value for name, value in asked.items()}).distributed
    return zero_config(settings, batch_size=8, processes=2, accumulation_steps=2, max_grad_norm=1.0, bf16=False)


def test_what_is_left_to_auto_is_the_run_s(tmp_path: Path) -> None:
    own = {
        "zero_optimization": {"stage": 3, "reduce_bucket_size": "auto", "stage3_prefetch_bucket_size": 1000},
        "bf16": {"enabled": "auto"},
        "train_batch_size": "auto",
        "gradient_clipping": "auto",
    }
    config = built(tmp_path, own)
    assert config["zero_optimization"] == {"stage": 3, "stage3_prefetch_bucket_size": 1000}
    assert config["bf16"] == {"enabled": False}
    assert (config["train_micro_batch_size_per_gpu"], config["gradient_clipping"]) == (2, 1.0)
    assert "train_batch_size" not in config


@pytest.mark.parametrize(
    ("own", "asked", "sentence"),
    [
        ({"train_batch_size": 6}, {}, "sets train_batch_size to 6, but the batch size is 8"),
        ({"zero_optimization": {"stage": 3}}, {"stage": 2}, "is for stage 3, but --stage says 2"),
        ({"zero_optimization": {"stage": 5}}, {}, "asks for ZeRO stage 5"),
        ({"optimizer": {"type": "Adam"}}, {}, "has a section optimizer"),
        ({"fp16": {"enabled": True}}, {}, "asks for fp16"),
        ({"fp16": {"enabled": "yes"}}, {}, "asks for fp16"),
        ({"bf16": True}, {}, "sets bf16 to true: it must be an object"),
        ({"zero_optimization": 2}, {}, "sets zero_optimization to 2: it must be an object"),
    ],
)
def test_a_contradiction_is_one_sentence(
    tmp_path: Path, own: dict[str, Any], asked: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(UserError, match=sentence):
        built(tmp_path, own, **asked)


def test_a_run_that_is_resumed_keeps_its_file_s_stage(tmp_path: Path) -> None:
    (tmp_path / "own.json").write_text(json.dumps({"zero_optimization": {"stage": 3}}))
    config = load_config(None, {"distributed.launch": "zero", "distributed.deepspeed_config": tmp_path / "own.json"})
    (tmp_path / "config.yaml").write_text(config.to_yaml())
    stored = load_config(tmp_path / "config.yaml")
    assert zero_stage(stored.distributed) == zero_stage(config.distributed) == 3
    assert zero_stage(load_config(None, {"distributed.launch": "zero"}).distributed) == 2
