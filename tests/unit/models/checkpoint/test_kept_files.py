"""What a saved model keeps of its source beside weights: headers, licences, the model card, the configuration."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from nano import FAMILY_EXAMPLES
from safetensors import safe_open
from safetensors.torch import load, save_file

from erasediff.models.latent_statistics import latent_statistics
from erasediff.models.load import load_text_to_image

pytestmark = pytest.mark.usefixtures("one_thread")
Folder = Callable[[str], Path]


def header(path: Path) -> dict[str, str]:
    with safe_open(path, "pt") as file:
        return dict(file.metadata())


def add_headers(folder: Path) -> None:
    for path in folder.glob("*/*.safetensors"):
        own = {"format": "pt", "license": f"of {path.parent.name}", "modelspec.hash_sha256": "0x1"}
        save_file(load(path.read_bytes()), path, own)


def test_headers_of_components_that_were_not_trained(nano_folder: Folder, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(nano_folder("sd"), tmp_path / "sd"))
    add_headers(folder)
    model: Any = load_text_to_image(folder)
    model.save(tmp_path / "out")
    model.save(tmp_path / "half", dtype=torch.float16)
    for component, file in (("vae", "diffusion_pytorch_model"), ("text_encoder", "model")):
        kept = header(tmp_path / "out" / component / f"{file}.safetensors")
        assert kept == header(folder / component / f"{file}.safetensors")
        # The hash of other bits would be wrong.
        del kept["modelspec.hash_sha256"]
        assert header(tmp_path / "half" / component / f"{file}.safetensors") == kept
    trained = header(tmp_path / "out" / "unet" / "diffusion_pytorch_model.safetensors")
    assert trained["license"] == "of unet"
    assert "modelspec.hash_sha256" not in trained


def test_licences_and_the_model_card(nano_folder: Folder, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(nano_folder("sd"), tmp_path / "sd"))
    documents = {"LICENSE.md": b"terms\r\n", "NOTICE": b"notice", "Licence.pdf": b"%PDF", "USE_POLICY.md": b"policy"}
    card = b"---\r\nlicense: openrail\r\n---\r\n# Model\r\n"
    for name, content in {**documents, "README.md": card, "sd-v1-4.ckpt": b"\x80", "sd.safetensors": b"x"}.items():
        (folder / name).write_bytes(content)
        (folder / name).chmod(0o444)
    load_text_to_image(folder).save(tmp_path / "out")
    assert {path.name for path in (tmp_path / "out").iterdir() if path.is_file()} == {
        *documents,
        "README.md",
        "model_index.json",
    }
    assert all((tmp_path / "out" / name).read_bytes() == content for name, content in documents.items())
    changed = (tmp_path / "out" / "README.md").read_bytes()
    assert changed.startswith(card)
    assert changed[len(card) :].decode().strip() == "The weights of `unet` were changed by unlearning with erasediff."
    load_text_to_image(folder).save(tmp_path / "out.safetensors", layout="single-file")
    assert header(tmp_path / "out.safetensors")["modelspec.license"] == "openrail"
    load_text_to_image(tmp_path / "out").save(tmp_path / "again")
    assert (tmp_path / "again" / "README.md").read_bytes() == changed


def test_a_read_only_source_makes_no_read_only_copy(nano_folder: Folder, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(nano_folder("sd"), tmp_path / "sd"))
    for path in folder.rglob("*"):
        path.chmod(0o555 if path.is_dir() else 0o444)
    load_text_to_image(folder).save(tmp_path / "out")
    for path in (tmp_path / "out").rglob("*"):
        assert path.stat().st_mode & 0o200
    for path in folder.rglob("*"):
        path.chmod(0o755)


CHANGES = {
    "sd": {"scheduler/scheduler_config.json": {"timestep_spacing": "trailing", "beta_end": 0.02}},
    "sd_v_prediction": {"vae/config.json": {"scaling_factor": 0.3}},
    "sdxl": {
        "model_index.json": {"force_zeros_for_empty_prompt": False},
        "vae/config.json": {"latents_mean": [0.1, 0.2, 0.3, 0.4], "latents_std": [1.0, 2.0, 3.0, 4.0]},
        "unet/config.json": {"sample_size": 24},
    },
    "sd3": {"scheduler/scheduler_config.json": {"shift": 5.0}, "vae/config.json": {"shift_factor": 0.5}},
    "flux": {"scheduler/scheduler_config.json": {"use_dynamic_shifting": False, "shift": 1.5}},
}


def changed(source: Path, target: Path, name: str) -> Path:
    folder = Path(shutil.copytree(source, target))
    for file, changes in CHANGES[name].items():
        (folder / file).write_text(json.dumps({**json.loads((folder / file).read_text()), **changes}))
    return folder


def told(model: Any) -> dict[str, Any]:
    """What the configuration says of schedule, latents and sizes."""
    return {
        "process": [model.process.alpha.tolist(), model.process.conditioning.tolist(), model.process.prediction_type],
        "scheduler": {k: v for k, v in model.scheduler.config.items() if not k.startswith("_")},
        "class": type(model.scheduler).__name__,
        "statistics": [
            torch.as_tensor(part).flatten().tolist() for part in latent_statistics(model.configs["vae"], model.device)
        ],
        "size": model.default_size,
        "null": {key: bool(value.any()) for key, value in model.encode_prompts([""]).items()},
    }


@pytest.mark.parametrize("name", FAMILY_EXAMPLES)
def test_schedules_and_scales_survive_both_layouts(name: str, nano_folder: Folder, tmp_path: Path) -> None:
    folder = changed(nano_folder(name), tmp_path / "changed", name)
    model: Any = load_text_to_image(folder)
    assert told(model) != told(load_text_to_image(nano_folder(name)))
    model.save(tmp_path / "folder")
    assert told(load_text_to_image(tmp_path / "folder")) == told(model)
    if model.original_layout is None:
        return
    single = tmp_path / "single.safetensors"
    model.save(single, layout="single-file")
    # The folder gives the sizes of the network alone: what it says of the rest is another model's.
    read: Any = load_text_to_image(single, config=nano_folder(name))
    assert told(read) == told(model)
    read.save(tmp_path / "back")
    assert told(load_text_to_image(tmp_path / "back")) == told(model)


@pytest.mark.parametrize("name", ["sd", "sd_v_prediction"])
def test_zero_terminal_snr_is_marked_for_sd_too(name: str, nano_folder: Folder, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(nano_folder(name), tmp_path / "sd"))
    for file, changes in (
        ("model_index.json", {"scheduler": ["diffusers", "DDIMScheduler"]}),
        (
            "scheduler/scheduler_config.json",
            {"_class_name": "DDIMScheduler", "prediction_type": "v_prediction", "rescale_betas_zero_snr": True},
        ),
    ):
        (folder / file).write_text(json.dumps({**json.loads((folder / file).read_text()), **changes}))
    single = tmp_path / "single.safetensors"
    load_text_to_image(folder).save(single, layout="single-file")
    tensors = load(single.read_bytes())
    assert {"ztsnr", "v_pred"} <= tensors.keys()
    for metadata in (header(single), None):
        # Other programs know the two entries alone; nano_folder's own scheduler may have no such schedule.
        save_file(tensors, single, metadata)
        read: Any = load_text_to_image(single, config=nano_folder(name))
        assert read.process.prediction_type == "v_prediction"
        assert float(read.process.alpha[-1]) == 0


def test_a_class_that_cannot_have_the_schedule_it_is_asked_for(nano_folder: Folder, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(nano_folder("sd"), tmp_path / "sd"))
    path = folder / "scheduler" / "scheduler_config.json"
    changes = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    with pytest.raises(Exception, match="which PNDMScheduler cannot have: give DDIMScheduler"):
        load_text_to_image(folder)
