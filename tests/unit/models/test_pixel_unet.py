"""Models survive the disk, are readable by plain diffusers, and damage is told in one sentence."""

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMPipeline, DDPMPipeline, DiffusionPipeline

from erasediff.errors import UserError
from erasediff.models import PixelModel
from erasediff.models.load import load_unprompted
from erasediff.parallel.full_weights import ema_weights
from erasediff.workflows.load_model import is_text_to_image
from erasediff.workflows.sample import labels_for
from erasediff_kernels import ConstrainedAdamW


def small(num_classes: int | None = 3, **changes: object) -> PixelModel:
    return PixelModel.build(num_classes=num_classes, block_out_channels=(8, 16), **changes)


@pytest.mark.parametrize("num_classes", [None, 3])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_a_saved_model_predicts_the_same_in_diffusers(
    tmp_path: Path, num_classes: int | None, prediction_type: str
) -> None:
    model = small(num_classes, prediction_type=prediction_type)
    model.save(tmp_path / "model")
    own, theirs = PixelModel.load(tmp_path / "model"), DDPMPipeline.from_pretrained(tmp_path / "model")
    labels = None if num_classes is None else torch.tensor([0, num_classes])
    noisy, timesteps = torch.randn(2, 1, 8, 8), torch.tensor([0, 999])
    expected = model.unet(noisy, timesteps, labels).sample
    assert torch.equal(own.unet(noisy, timesteps, labels).sample, expected)
    assert torch.equal(theirs.unet(noisy, timesteps, labels).sample, expected)
    assert own.scheduler.config.prediction_type == theirs.scheduler.config.prediction_type == prediction_type
    assert own.num_classes == num_classes
    assert own.image_shape == (1, 8, 8)


def test_the_seed_alone_sets_the_first_weights() -> None:
    state = torch.get_rng_state()
    first, again, other = small(seed=1), small(seed=1), small(seed=2)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first.unet.conv_in.weight, again.unet.conv_in.weight)
    assert not torch.equal(first.unet.conv_in.weight, other.unet.conv_in.weight)


def test_saving_over_a_model_is_refused_unless_asked_for(tmp_path: Path) -> None:
    small().save(tmp_path / "model")
    with pytest.raises(UserError, match="exists already"):
        small().save(tmp_path / "model")
    small(num_classes=5).save(tmp_path / "model", replace=True)
    assert PixelModel.load(tmp_path / "model").num_classes == 5


def test_what_is_no_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not a diffusers model folder"):
        PixelModel.load(tmp_path)
    (tmp_path / "model_index.json").write_text('{"unet": ["diffusers", "UNet2DConditionModel"]}')
    with pytest.raises(UserError, match="of models in pixels"):
        PixelModel.load(tmp_path)


@pytest.mark.parametrize(
    "damaged", ["model_index.json", "unet/config.json", "unet/diffusion_pytorch_model.safetensors", "scheduler"]
)
@pytest.mark.parametrize("how", ["cut short", "missing"])
def test_a_damaged_model_is_refused(tmp_path: Path, damaged: str, how: str) -> None:
    small().save(tmp_path / "model")
    path = tmp_path / "model" / damaged
    if path.is_dir():
        path = path / "scheduler_config.json"
    if how == "missing":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(UserError, match=r"incomplete|corrupt|damaged|not a diffusers model folder"):
        PixelModel.load(tmp_path / "model")


def test_a_pipeline_without_folders_of_components_is_loaded_and_saved_with_them(
    nano: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The layout of diffusers' first models on the hub, such as google/ddpm-cifar10-32."""
    flat = tmp_path / "flat"
    nano.save("ddim_class", flat)
    for component in ("unet", "scheduler"):
        for file in (flat / component).iterdir():
            file.rename(flat / file.name)
        (flat / component).rmdir()
    (flat / "LICENSE").write_text("as is")
    monkeypatch.setattr("erasediff.models.checkpoint.hub.snapshot_download", lambda *_, **__: str(flat))
    assert not is_text_to_image(Path("some-one/some-model"))
    model = load_unprompted("some-one/some-model")
    assert isinstance(model, PixelModel)
    assert not model.is_schedule_assumed
    model.save(tmp_path / "out")
    pipeline = DiffusionPipeline.from_pretrained(tmp_path / "out")
    assert isinstance(pipeline, DDIMPipeline)
    assert pipeline.scheduler.config.num_train_timesteps == 100
    assert (tmp_path / "out/LICENSE").read_text() == "as is"


def test_classes_that_only_data_tell_have_names_of_their_own_and_no_null_label(nano: Any, tmp_path: Path) -> None:
    nano.save("ddpm_timestep", tmp_path / "in")
    model: Any = PixelModel.load(tmp_path / "in")
    assert (model.condition, model.num_classes, model.null_label) == ("class", None, None)
    with pytest.raises(UserError, match="does not say which classes it has"):
        labels_for(model, tmp_path / "in", None, 1)
    described = model.described_by(("0", "1"))
    described.save(tmp_path / "out")
    again = PixelModel.load(tmp_path / "out")
    assert (again.class_names, again.num_classes, again.null_label) == (("0", "1"), 2, None)
    noisy = torch.randn(2, 3, 32, 32)
    prediction = again.predict(again.denoiser, noisy, torch.tensor([1, 1]), {"class_labels": torch.tensor([0, 1])})
    assert prediction.shape == noisy.shape


def test_averaged_weights_are_held_within_the_block_only() -> None:
    model = small()
    optimizer = ConstrainedAdamW(model.unet.parameters(), lr=0.1, ema_decay=0.5)
    before = model.unet.conv_in.weight.detach().clone()
    model.unet(torch.randn(2, 1, 8, 8), torch.tensor([1, 2]), torch.tensor([0, 1])).sample.square().mean().backward()
    optimizer.step()
    after = model.unet.conv_in.weight.detach().clone()
    with ema_weights(optimizer):
        torch.testing.assert_close(model.unet.conv_in.weight.detach(), (before + after) / 2)
    assert torch.equal(model.unet.conv_in.weight, after)


def test_own_weights_come_back_after_an_error() -> None:
    model = small()
    optimizer = ConstrainedAdamW(model.unet.parameters(), lr=0.1, ema_decay=0.5)
    for parameter in model.unet.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    after = model.unet.conv_in.weight.detach().clone()
    with pytest.raises(KeyboardInterrupt), ema_weights(optimizer):
        raise KeyboardInterrupt
    assert torch.equal(model.unet.conv_in.weight, after)
