"""Every family end to end: load, encode, train a few steps, save, reload with plain diffusers, sample."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoPipelineForText2Image, DDPMScheduler, DiffusionPipeline
from nano import FAMILY_EXAMPLES, VARIANTS
from safetensors.torch import load_file, save_file
from torch import Tensor

from erasediff import EraseDiff
from erasediff.errors import UserError
from erasediff.models.load import load_text_to_image
from erasediff_kernels import ConstrainedAdamW

FAMILIES = FAMILY_EXAMPLES
COUNT = 4

pytestmark = pytest.mark.usefixtures("one_thread")
every_family = pytest.mark.parametrize("name", FAMILIES)
every_network = pytest.mark.parametrize("name", [*FAMILIES, *VARIANTS])
Folder = Callable[[str], Path]


def condition(model: Any, prompts: list[str], size: int) -> dict[str, Tensor]:
    encoded = model.encode_prompts(prompts)
    return encoded | model.size_condition((size, size), (0, 0), (size, size), len(prompts))


def batch(model: Any, prompt: str, size: int, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.rand(COUNT, 3, size, size, generator=generator) * 2 - 1
    return {"sample": model.encode_images(pixels), **condition(model, [prompt] * COUNT, size)}


def unlearn(model: Any, size: int, steps: int = 3, **options: Any) -> None:
    optimizer = ConstrainedAdamW(model.denoiser.parameters(), lr=1e-3)
    unlearner = EraseDiff(model.denoiser, optimizer, process=model.process, denoiser=model.predict, **options)
    retain, forget = batch(model, "a cat", size), batch(model, "a dog", size, seed=1)
    for _ in range(steps):
        assert unlearner.step(retain, forget).finite


def weights(folder: Path, component: str) -> dict[str, Tensor]:
    merged: dict[str, Tensor] = {}
    for path in sorted((folder / component).glob("*.safetensors")):
        merged |= load_file(path)
    return merged


def assert_same_bits(own: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert own.keys() == theirs.keys()
    for name, tensor in own.items():
        assert tensor.dtype == theirs[name].dtype, name
        assert torch.equal(tensor, theirs[name]), name


@every_network
def test_unlearned_model_predicts_and_samples_the_same_in_plain_diffusers(
    name: str, nano: Any, nano_folder: Folder, tmp_path: Path
) -> None:
    model: Any = load_text_to_image(nano_folder(name))
    before = model.denoiser_hash()
    unlearn(model, nano.SIZE)
    assert model.denoiser_hash() != before
    model.save(tmp_path / "out")

    theirs = DiffusionPipeline.from_pretrained(tmp_path / "out")
    theirs.set_progress_bar_config(disable=True)
    assert type(theirs) is model.pipeline_class
    assert theirs.scheduler.config == model.scheduler.config
    module = getattr(theirs, model.denoiser_component)
    data = batch(model, "a cat", nano.SIZE)
    timesteps = model.process.conditioning[torch.tensor([0, 10, 500, 999])]
    own = model.predict(model.denoiser, data["sample"], timesteps, data)
    assert torch.equal(own, model.predict(module, data["sample"], timesteps, data))

    again: Any = load_text_to_image(tmp_path / "out")
    assert again.denoiser_hash() == model.denoiser_hash()
    assert again.hash == model.hash
    settings = {"num_inference_steps": 2, "height": nano.SIZE, "width": nano.SIZE}
    images = model.sample(["a cat", "a dog"], seed=3, batch_size=2, **settings)
    assert images.dtype == torch.uint8
    assert images.shape == (2, nano.SIZE, nano.SIZE, 3)
    assert torch.equal(images, again.sample(["a cat", "a dog"], seed=3, batch_size=2, **settings))


@every_family
def test_pipelines_own_prediction_is_what_is_trained(name: str, nano: Any, nano_folder: Folder) -> None:
    """The network's inputs while diffusers samples are what ``predict`` gives it for the same latent and prompt."""
    model: Any = load_text_to_image(nano_folder(name))
    theirs = DiffusionPipeline.from_pretrained(nano_folder(name))
    theirs.set_progress_bar_config(disable=True)
    calls: list[tuple[tuple[Any, ...], dict[str, Any], Any]] = []
    getattr(theirs, model.denoiser_component).register_forward_hook(
        lambda module, args, kwargs, out: calls.append((args, kwargs, out[0])), with_kwargs=True
    )
    size = nano.SIZE
    theirs(
        prompt=["a cat"],
        guidance_scale=1.0,
        num_inference_steps=1,
        height=size,
        width=size,
        output_type="latent",
        generator=torch.Generator().manual_seed(0),
        **model.text_length(),
    )
    args, kwargs, prediction = calls[0]
    sample = args[0] if args else kwargs["hidden_states"]
    timestep = args[1] if len(args) > 1 else kwargs["timestep"]
    timestep = timestep.reshape(-1)[:1].float() * (1000 if name == "flux" else 1)
    latents = model.unpacked(sample, model.latent_shape(size, size))
    own = model.predict(model.denoiser, latents, timestep, condition(model, ["a cat"], size))
    torch.testing.assert_close(own, model.unpacked(prediction, model.latent_shape(size, size)))


@every_network
def test_what_was_not_trained_keeps_its_bits(name: str, nano: Any, nano_folder: Folder, tmp_path: Path) -> None:
    source = nano_folder(name)
    model: Any = load_text_to_image(source, dtype=torch.bfloat16)
    parameters = dict(model.denoiser.named_parameters())
    trained = next(key for key, value in parameters.items() if value.ndim == 2)
    with torch.no_grad():
        parameters[trained].add_(1.0)
    model.release_encoders()
    model.save(tmp_path / "out")
    for component in [model.denoiser_component, "vae", *model.encoder_names]:
        own, theirs = weights(tmp_path / "out", component), weights(source, component)
        if component == model.denoiser_component:
            assert torch.equal(own.pop(trained), parameters[trained].detach().float())
            del theirs[trained]
        assert_same_bits(own, theirs)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["sdxl", "flux"])
def test_saved_in_half_precision_and_in_shards(
    name: str, dtype: torch.dtype, nano: Any, nano_folder: Folder, tmp_path: Path
) -> None:
    model: Any = load_text_to_image(nano_folder(name))
    model.save(tmp_path / "out", dtype=dtype, max_shard_size=50_000)
    assert len(list((tmp_path / "out" / model.denoiser_component).glob("*-of-*.safetensors"))) > 1
    theirs = AutoPipelineForText2Image.from_pretrained(tmp_path / "out", torch_dtype=dtype)
    state = getattr(theirs, model.denoiser_component).state_dict()
    assert_same_bits(state, {key: value.to(dtype) for key, value in model.denoiser.state_dict().items()})
    again: Any = load_text_to_image(tmp_path / "out", dtype=dtype)
    assert_same_bits(again.denoiser.state_dict(), state)
    image = again.sample(["a cat"], height=nano.SIZE, width=nano.SIZE, num_inference_steps=1)
    assert image.float().std() > 0


def test_what_is_not_the_models_is_kept(nano_folder: Folder, tmp_path: Path) -> None:
    """A safety checker is never built, but it and a licence come out as they went in."""
    source = Path(shutil.copytree(nano_folder("sd"), tmp_path / "in"))
    (source / "unet" / "LICENSE").write_text("as is")
    index = json.loads((source / "model_index.json").read_text())
    index["safety_checker"] = ["stable_diffusion", "StableDiffusionSafetyChecker"]
    (source / "model_index.json").write_text(json.dumps(index))
    checker = source / "safety_checker"
    checker.mkdir()
    (checker / "config.json").write_text("{}")
    save_file({"vision_model.weight": torch.rand(3, 2).half()}, checker / "model.safetensors")
    load_text_to_image(source).save(tmp_path / "out")
    assert (tmp_path / "out" / "unet" / "LICENSE").read_text() == "as is"
    assert (tmp_path / "out" / "model_index.json").read_bytes() == (source / "model_index.json").read_bytes()
    assert_same_bits(weights(tmp_path / "out", "safety_checker"), weights(source, "safety_checker"))

    (checker / "model.safetensors").rename(checker / "pytorch_model.bin")
    with pytest.raises(UserError, match="safety_checker holds its weights as pickles"):
        load_text_to_image(source)


@every_family
def test_gradient_checkpointing_changes_nothing_and_bfloat16_trains(name: str, nano: Any, nano_folder: Folder) -> None:
    states = []
    for checkpointing in (False, True):
        model: Any = load_text_to_image(nano_folder(name))
        if checkpointing:
            model.denoiser.train().enable_gradient_checkpointing()
        unlearn(model, nano.SIZE, steps=1)
        states.append(model.denoiser.state_dict())
    assert_same_bits(*states)
    half: Any = load_text_to_image(nano_folder(name), dtype=torch.bfloat16)
    unlearn(half, nano.SIZE, steps=1)
    mixed: Any = load_text_to_image(nano_folder(name))
    unlearn(mixed, nano.SIZE, steps=1, autocast=torch.bfloat16)


@every_family
def test_image_does_not_depend_on_its_batch(name: str, nano: Any, nano_folder: Folder) -> None:
    model: Any = load_text_to_image(nano_folder(name))
    prompts = ["a cat", "a dog", ""]
    settings = {"num_inference_steps": 2, "height": nano.SIZE, "width": nano.SIZE, "seed": 5}
    done: list[int] = []
    together = model.sample(prompts, batch_size=3, progress=done.append, **settings).int()
    alone = model.sample(prompts, batch_size=1, **settings).int()
    assert done == [3]
    assert (together - alone).abs().max() <= 1
    assert (together[0] - together[1]).abs().max() > 1
    assert model.sample([], **settings).shape == (0, nano.SIZE, nano.SIZE, 3)


def test_stochastic_sampler_draws_by_image(nano: Any, nano_folder: Folder, tmp_path: Path) -> None:
    pipeline = DiffusionPipeline.from_pretrained(nano_folder("sd"))
    pipeline.scheduler = DDPMScheduler.from_config(pipeline.scheduler.config)
    pipeline.save_pretrained(tmp_path / "ddpm")
    model = load_text_to_image(tmp_path / "ddpm")
    settings = {"num_inference_steps": 2, "height": nano.SIZE, "width": nano.SIZE}
    together = model.sample(["a cat", "a cat"], batch_size=2, **settings).int()
    assert (together - model.sample(["a cat", "a cat"], batch_size=1, **settings).int()).abs().max() <= 1


@every_family
def test_encoders_leave_memory_and_come_back(name: str, nano: Any, nano_folder: Folder) -> None:
    model: Any = load_text_to_image(nano_folder(name))
    before, text, fingerprint = batch(model, "a cat", nano.SIZE), model.encode_prompts(["a cat"]), model.hash
    model.release_encoders()
    assert model._encoders is None
    assert model.hash == fingerprint
    model.restore_encoders()
    assert model._encoders is not None
    after = batch(model, "a cat", nano.SIZE)
    assert all(torch.equal(value, after[key]) for key, value in before.items())
    assert all(torch.equal(value, model.encode_prompts(["a cat"])[key]) for key, value in text.items())


@every_family
def test_latents_are_what_the_pipeline_decodes(name: str, nano: Any, nano_folder: Folder) -> None:
    model: Any = load_text_to_image(nano_folder(name))
    pixels = torch.rand(2, 3, nano.SIZE, 2 * nano.SIZE) * 2 - 1
    latents = model.encode_images(pixels)
    assert latents.shape == (2, *model.latent_shape(nano.SIZE, 2 * nano.SIZE))
    config = model.configs["vae"]
    unscaled = latents / config.scaling_factor + (config.get("shift_factor") or 0.0)
    torch.testing.assert_close(unscaled, model.encoders["vae"].encode(pixels).latent_dist.mean)
    drawn = model.encode_images(pixels, sample_ids=torch.tensor([4, 7]), seed=1)
    torch.testing.assert_close(drawn[1:], model.encode_images(pixels[1:], sample_ids=torch.tensor([7]), seed=1))
    assert not torch.equal(drawn, model.encode_images(pixels, sample_ids=torch.tensor([4, 7]), seed=2))
    assert model.decode_latents(latents).shape == pixels.shape


def test_empty_prompt_is_the_checkpoints_null_condition(nano_folder: Folder) -> None:
    """SDXL's pipeline guides away from zeros, Stable Diffusion's from the encoded empty prompt."""
    sdxl = load_text_to_image(nano_folder("sdxl")).encode_prompts(["", "a cat"])
    assert all(value[0].count_nonzero() == 0 and value[1].count_nonzero() > 0 for value in sdxl.values())
    sd = load_text_to_image(nano_folder("sd")).encode_prompts([""])
    assert sd["encoder_hidden_states"].count_nonzero() > 0


def test_hash_tells_encoders_apart(nano: Any, nano_folder: Folder, tmp_path: Path) -> None:
    hashes = [load_text_to_image(nano_folder(name)).hash for name in FAMILIES]
    hashes.append(load_text_to_image(nano.save("sd", tmp_path / "other", seed=1)).hash)
    hashes.append(load_text_to_image(nano_folder("sd"), dtype=torch.bfloat16).hash)
    assert len(set(hashes)) == len(hashes)


def test_image_size_that_does_not_fit_is_refused(nano_folder: Folder) -> None:
    for name, size in (("sd", 31), ("flux", 34), ("sd3", 0)):
        with pytest.raises(UserError, match="give multiples of"):
            load_text_to_image(nano_folder(name)).latent_shape(size, 32)


def test_sd3_may_come_without_t5(nano: Any, nano_folder: Folder, tmp_path: Path) -> None:
    without = {"text_encoder_3": None, "tokenizer_3": None}
    pipeline = DiffusionPipeline.from_pretrained(nano_folder("sd3"), **without)
    pipeline.save_pretrained(tmp_path / "in")
    model: Any = load_text_to_image(tmp_path / "in")
    unlearn(model, nano.SIZE, steps=1)
    model.save(tmp_path / "out")
    assert DiffusionPipeline.from_pretrained(tmp_path / "out", **without).text_encoder_3 is None
    assert model.sample(["a cat"], height=nano.SIZE, width=nano.SIZE, num_inference_steps=1).shape[0] == 1


def test_flux_guidance(nano: Any, nano_folder: Folder, tmp_path: Path) -> None:
    """Distilled guidance is 1 in training unless the batch says otherwise; the undistilled network has none."""
    model: Any = load_text_to_image(nano_folder("flux"))
    data = batch(model, "a cat", nano.SIZE)
    timesteps = torch.full((COUNT,), 500.0)

    def predicted(guidance: float) -> Tensor:
        given = {**data, "guidance": torch.full((COUNT,), guidance)}
        result: Tensor = model.predict(model.denoiser, data["sample"], timesteps, given)
        return result

    assert torch.equal(model.predict(model.denoiser, data["sample"], timesteps, data), predicted(1.0))
    assert not torch.equal(predicted(1.0), predicted(3.5))
    with pytest.raises(UserError, match="without a negative prompt"):
        model.sample(["a cat"], negative_prompt="a dog", height=nano.SIZE, width=nano.SIZE)

    nano.flux(guidance_embeds=False).save_pretrained(tmp_path / "schnell")
    schnell: Any = load_text_to_image(tmp_path / "schnell")
    unlearn(schnell, nano.SIZE, steps=1)
