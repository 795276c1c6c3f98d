"""The registry of methods: what their files declare is what the command line and the configuration know and check."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import erasediff
from erasediff.config import Config, UnlearnConfig, load_config
from erasediff.config.method_index import method_index
from erasediff.errors import UserError
from erasediff.methods import METHOD_SPECS
from erasediff.methods.spec import UNTIL_KEYS
from erasediff.models import PixelModel
from erasediff.workflows import labelled_run, prompted_run
from erasediff.workflows.build_method import check_settings
from erasediff.workflows.build_unlearning import build_unlearning_job

NANO = """
threads: 1
images: {height: 32, width: 32, bucket_step: 16, images_per_prompt: 2}
"""
# A value other than the default for each setting of ``unlearn`` but ``method``.
OTHER_VALUES: dict[str, Any] = {
    "model": "elsewhere",
    "forget": [4],
    "retain": [5],
    "steps": 7,
    "until": "steps",
    "max_steps": 9,
    "max_minutes": 3.0,
    "batch_size": 10,
    "lr": 0.5,
    "lr_schedule": "constant",
    "warmup_steps": 3,
    "weight_decay": 0.2,
    "ema_decay": None,
    "moments": "8-bit",
    "retain_label_dropout": 0.2,
    "forget_label_dropout": 0.3,
    "min_snr_gamma": 5.0,
    "max_grad_norm": 2.0,
    "accumulation_steps": 2,
    "target": "gaussian",
    "target_space": "prediction",
    "relabel_to": [1],
    "teacher": "current",
    "retain_target": "true",
    "barrier": "gap",
    "eta": 0.7,
    "level": 0.4,
    "inner_steps": 5,
    "inner_lr": 0.1,
    "inner_refresh_every": 2,
    "antithetic": True,
}
SHORT = {"salun": {"batches": 1}, "selective-amnesia": {"fisher_batches": 1}, "pruning": {"observations": 1}}


def test_every_setting_of_unlearn_has_another_value() -> None:
    assert OTHER_VALUES.keys() | {"method"} == UnlearnConfig.model_fields.keys()


def test_the_index_without_torch_is_the_registry() -> None:
    assert list(method_index()) == sorted(METHOD_SPECS)
    for name, entry in method_index().items():
        spec = METHOD_SPECS[name]
        assert (entry.name, entry.summary) == (spec.name, spec.summary)
        assert entry.section == (spec.section if spec.config else None)
        if spec.config:
            assert isinstance(getattr(Config(), spec.section), spec.config)
            assert Config().section(spec.config) == spec.config()


@pytest.mark.parametrize("method", sorted(METHOD_SPECS))
def test_settings_that_a_method_does_not_read_are_refused(method: str) -> None:
    spec = METHOD_SPECS[method]
    reads = spec.reads(load_config(None, {"unlearn.method": method}))
    assert reads <= UnlearnConfig.model_fields.keys()
    for key, value in OTHER_VALUES.items():
        config = load_config(None, {"unlearn.method": method, f"unlearn.{key}": value})
        if key in reads:
            check_settings(config)
            continue
        with pytest.raises(UserError, match=rf"The method {method} does not read unlearn\.{key}") as caught:
            check_settings(config)
        assert "\n" not in str(caught.value)
    for other in METHOD_SPECS.values():
        if other.config is None:
            continue
        key, default = next(iter(other.config().model_dump().items()))
        config = load_config(None, {"unlearn.method": method, f"{other.section}.{key}": default})
        if other is spec or other.section in spec.sections:
            check_settings(config)
            continue
        with pytest.raises(UserError, match=rf"{other.section}\.{key}, a setting of {other.name}"):
            check_settings(config)


@pytest.fixture
def read_keys(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, dict[str, Any]], tuple[Config, set[str]]]:
    """A configuration of a method, and the settings of ``unlearn`` that are read once defaults are filled in."""

    def recording(method: str, values: dict[str, Any]) -> tuple[Config, set[str]]:
        seen: set[str] = set()

        class Recording(UnlearnConfig):
            def __getattribute__(self, name: str) -> Any:
                if name in UnlearnConfig.model_fields:
                    seen.add(name)
                return super().__getattribute__(name)

        config = load_config(None, {"unlearn.method": method, **values})
        for module, name in ((labelled_run, "resolved"), (prompted_run, "with_latent_defaults")):
            original = getattr(module, name)

            def defaults(*args: Any, original: Callable[..., Config] = original, **kwargs: Any) -> Config:
                complete = original(*args, **kwargs)
                unlearn = Recording(**dict(complete.unlearn))
                seen.clear()
                return complete.model_copy(update={"unlearn": unlearn})

            monkeypatch.setattr(module, name, defaults)
        return config, seen

    return recording


# Looked at before defaults are filled in: which model, which classes, and whether the run goes on until it forgot.
BEFORE = {"model", "forget", "retain", *UNTIL_KEYS}


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize(
    "method", ["erasediff", "finetune", "neggrad", "pruning", "retrain", "salun", "selective-amnesia"]
)
def test_a_method_reads_what_it_declares(
    method: str, read_keys: Callable[[str, dict[str, Any]], tuple[Config, set[str]]]
) -> None:
    values: dict[str, Any] = {"device": "cpu", "unlearn.forget": [3], "unlearn.batch_size": 4}
    values |= {f"{METHOD_SPECS[method].section}.{key}": value for key, value in SHORT.get(method, {}).items()}
    if method == "pruning":
        values["pruning.objective"] = "erasediff"
    config, seen = read_keys(method, values)
    build_unlearning_job(config, PixelModel.build(num_classes=10, block_out_channels=(8, 8), layers_per_block=1))
    assert seen - BEFORE - {"method"} == METHOD_SPECS[method].reads(config) - BEFORE - {"method"}


@pytest.mark.usefixtures("here", "one_thread")
@pytest.mark.parametrize("method", ["esd", "pruning"])
def test_a_method_of_prompts_reads_what_it_declares(
    method: str,
    read_keys: Callable[[str, dict[str, Any]], tuple[Config, set[str]]],
    nano_folder: Callable[[str], Path],
) -> None:
    values = {
        "device": "cpu",
        "unlearn.model": str(nano_folder("sd")),
        "unlearn.batch_size": 2,
        "images.forget_prompts": ["a cat"],
        "esd.num_inference_steps": 2,
        **({"pruning.observations": 1} if method == "pruning" else {}),
    }
    config, seen = read_keys(method, values)
    build_unlearning_job(config)
    reads = METHOD_SPECS[method].reads(config)
    # Every solver is given ``antithetic``, but trajectories bring timesteps of their own; ``relabel_to`` is refused.
    assert seen - BEFORE - {"method", "antithetic", "relabel_to"} == reads - BEFORE - {"method"}


NEW_METHOD = '''
"""Fine-tuning on a part of the retained data."""

from erasediff.config.fields import Positive, Section
from erasediff.methods.baselines import FineTune
from erasediff.methods.spec import RETAIN_KEYS, SOLVER_KEYS, BuildContext, MethodSpec, Requirements


class ToyConfig(Section):
    scale: Positive = 1.0


class Toy(FineTune):
    name = "toy-method"


def build(context: BuildContext) -> Toy:
    assert context.config.section(ToyConfig).scale == 2.0
    return Toy(context.network, context.optimizer, process=context.process, **context.options)


SPEC = MethodSpec(
    name="toy-method",
    summary="a toy",
    config=ToyConfig,
    reads=lambda _: SOLVER_KEYS | RETAIN_KEYS,
    needs=lambda _: Requirements(forget=False),
    build=build,
)
'''
COMMANDS = """
import sys
from pathlib import Path
from erasediff.cli import main

def run(*arguments):
    sys.argv = ["erasediff", *arguments]
    try:
        main()
    except SystemExit as ended:
        return ended.code

assert run("unlearn", "--help") == 0
assert run("info", "--methods") == 0
assert not {"torch", "diffusers"} & sys.modules.keys()
assert run("info", "--config") == 0
from erasediff.models import PixelModel
PixelModel.build(num_classes=10, block_out_channels=(8, 8), layers_per_block=1).save(Path("base"))
base = ("unlearn", "--no-verdict", "--model", "base")
digits = (*base, "--forget", "3", "--steps", "1", "--batch-size", "4", "--device", "cpu")
assert run(*digits, "--method", "toy-method", "--set", "toy_method.scale=2", "--out", "out") == 0
assert run(*digits, "--method", "toy-method", "--eta", "2", "--out", "refused") == 2
assert run(*digits, "--set", "toy_method.scale=2", "--out", "refused") == 2
assert run(*digits, "--method", "toy-method", "--set", "toy_method.scal=2", "--out", "refused") == 2
"""


def test_a_new_method_is_one_file(tmp_path: Path) -> None:
    """In a copy of the package, to which nothing but that file is added."""
    source = Path(erasediff.__file__).parent
    shutil.copytree(source, tmp_path / "engine/erasediff", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "engine/erasediff/methods/toy.py").write_text(NEW_METHOD)
    paths = [str(tmp_path / "engine"), *sys.path]
    ended = subprocess.run(
        [sys.executable, "-c", COMMANDS],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), "COLUMNS": "200", "OMP_NUM_THREADS": "1"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    assert "toy-method" in ended.stdout
    assert "toy_method:\n  scale: 1.0\n" in ended.stdout
    assert "toy_method:\n  scale: 2.0\n" in (tmp_path / "out/config.yaml").read_text()
    errors = " ".join(ended.stderr.split())
    assert "The method toy-method does not read unlearn.eta" in errors
    assert "The method erasediff does not read toy_method.scale, a setting of toy-method" in errors
    assert 'Unknown setting "toy_method.scal"; did you mean toy_method.scale' in errors
    assert not (tmp_path / "refused").exists()
