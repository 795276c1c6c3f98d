"""Runs that are older than a setting go on as they began."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from erasediff.config import Config, load_config
from erasediff.errors import UserError
from erasediff.training.run_dir import RunFolder


def older(path: Path, config: Config) -> Path:
    """The configuration of a run from before there were ``unlearn.target_space`` and ``images.cache``."""
    values = yaml.safe_load(config.to_yaml())
    del values["unlearn"]["target_space"], values["images"]["cache"]
    path.mkdir()
    (path / "config.yaml").write_text(yaml.safe_dump(values))
    return path


def test_a_run_from_before_the_space_of_targets_compares_raw_predictions(tmp_path: Path) -> None:
    run = older(tmp_path / "run", load_config(None, {"unlearn.target": "gaussian"}))
    config = load_config(run / "config.yaml")
    assert config.unlearn.resolved(conditional=True, retained=[1]).target_space == "prediction"
    RunFolder.resume(run, config)
    assert "target_space: prediction" in (run / "config.yaml").read_text()


def test_a_users_own_file_has_the_default_space(tmp_path: Path) -> None:
    (tmp_path / "own.yaml").write_text("unlearn: {target: gaussian}\n")
    config = load_config(tmp_path / "own.yaml")
    assert config.unlearn.resolved(conditional=True, retained=[1]).target_space == "noise"


def test_a_run_from_before_images_were_chosen_reads_them_all(tmp_path: Path) -> None:
    run = older(tmp_path / "run", load_config())
    config = load_config(run / "config.yaml")
    assert config.images.cache == "all"
    with pytest.raises(UserError, match=r"started with another images\.cache: begin a new one"):
        RunFolder.resume(run, load_config(run / "config.yaml", {"images.cache": "needed"}))
    RunFolder.resume(run, config)
    assert load_config(run / "config.yaml").images.cache == "all"
    assert load_config().images.cache == "needed"
