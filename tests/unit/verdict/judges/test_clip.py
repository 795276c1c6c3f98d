"""Zero-shot judge on nano CLIP and SigLIP, taught three colours."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from nano import CHARACTERS, TOKENS, clip_tokenizer
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, SiglipConfig, SiglipModel

from erasediff.errors import UserError
from erasediff.verdict.judges.base import Candidate
from erasediff.verdict.judges.clip import prompt_of
from erasediff.verdict.judges.pictures import pictures
from erasediff.verdict.judges.registry import judge_named

SIDE = 16
WIDTHS = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
END = 2 * len(CHARACTERS) + 1
TEXT = {**WIDTHS, "vocab_size": END + 1, "max_position_embeddings": TOKENS, "eos_token_id": END, "pad_token_id": END}
VISION = {**WIDTHS, "image_size": SIDE, "patch_size": 8}


def processor() -> CLIPImageProcessorPil:
    side = {"height": SIDE, "width": SIDE}
    return CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size=side)


def save_taught(model: Any, padding: Any, images: Tensor, texts: list[str], folder: Path) -> Path:
    """Fit ``model`` to match each image with its text, and save it with tokenizer and image processor."""
    tokens = clip_tokenizer()(texts, padding=padding, max_length=TOKENS, truncation=True, return_tensors="pt")
    pixels = processor()(images=pictures(images), return_tensors="pt")["pixel_values"]
    if padding == "max_length":
        tokens = {"input_ids": tokens["input_ids"]}
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for _ in range(40):
        optimizer.zero_grad()
        logits = model(**tokens, pixel_values=pixels).logits_per_image
        torch.autograd.backward(torch.nn.functional.cross_entropy(logits, torch.arange(len(texts))))
        optimizer.step()
    for part in (model, clip_tokenizer(), processor()):
        part.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("clip")
    images = (255 * torch.eye(3, dtype=torch.uint8))[:, :, None, None].expand(-1, -1, 20, 20)
    texts = ["a photo of red", "a photo of green", "the sea is blue"]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        clip = CLIPModel(CLIPConfig(text_config=TEXT, vision_config=VISION, projection_dim=16))
        siglip = SiglipModel(SiglipConfig(text_config=TEXT, vision_config=VISION))
        return {
            "clip": save_taught(clip, True, images, texts, folder / "clip"),
            "siglip": save_taught(siglip, "max_length", images, texts, folder / "siglip"),
        }


@pytest.mark.parametrize("family", ["clip", "siglip"])
def test_an_image_shows_the_candidate_of_its_text(family: str, folders: dict[str, Path], plain_images: Tensor) -> None:
    judge = judge_named(f"clip:{folders[family]}")
    sought, others = (
        [Candidate("the sea is blue", "the sea is blue")],
        [Candidate("red", "red"), Candidate("green", "green")],
    )
    assert judge.name == "clip"
    assert judge.tells_apart
    assert judge.answers(plain_images, sought, others).tolist() == [1, 2, 0]
    assert judge.answers(plain_images[:0], sought, others).tolist() == []


def test_files_and_template_are_described(folders: dict[str, Path]) -> None:
    description = judge_named(f"clip:{folders['clip']}").description
    assert description["template"] == "a photo of {}"
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= description["sha256"].keys()
    assert all(len(digest) == 64 for digest in description["sha256"].values())


@pytest.mark.parametrize(
    ("label", "text", "prompt"),
    [
        ("ankle boot", "ankle boot", "a photo of ankle boot"),
        ("a photo of a coat", "a photo of a coat", "a photo of a coat"),
        ("coat", "a picture of a coat", "a picture of a coat"),
    ],
)
def test_only_a_bare_name_is_put_into_the_template(label: str, text: str, prompt: str) -> None:
    assert prompt_of(Candidate(label, text)) == prompt


def test_weights_of_older_files_are_read(folders: dict[str, Path], plain_images: Tensor, tmp_path: Path) -> None:
    """Half precision, and the positions that older versions of transformers kept among the weights."""
    for file in folders["clip"].iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    tensors = {name: tensor.half() for name, tensor in load_file(tmp_path / "model.safetensors").items()}
    tensors["text_model.embeddings.position_ids"] = torch.arange(TOKENS)[None]
    (tmp_path / "model.safetensors").unlink()
    for number, part in enumerate((dict(list(tensors.items())[::2]), dict(list(tensors.items())[1::2]))):
        save_file(part, tmp_path / f"model-{number + 1:05d}-of-00002.safetensors", {"format": "pt"})
    candidates = [Candidate("red", "red"), Candidate("green", "green")]
    assert judge_named(f"clip:{tmp_path}").answers(plain_images[:2], candidates[:1], candidates[1:]).tolist() == [0, 1]


def test_pickles_and_damaged_folders_are_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    def changed(name: str, **settings: Any) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        for file in folders["clip"].iterdir():
            (folder / file.name).write_bytes(file.read_bytes())
        config = json.loads((folder / "config.json").read_text()) | settings
        (folder / "config.json").write_text(json.dumps(config))
        return folder

    pickled = changed("pickled")
    (pickled / "model.safetensors").rename(pickled / "pytorch_model.bin")
    torn = changed("torn")
    (torn / "model.safetensors").write_bytes((torn / "model.safetensors").read_bytes()[:1000])
    wordless = changed("wordless")
    for file in (*wordless.glob("token*"), *wordless.glob("vocab*"), *wordless.glob("merges*")):
        file.unlink()
    for folder, told in (
        (pickled, "has no .safetensors"),
        (torn, "cannot be read as safetensors"),
        (wordless, "tokenizer"),
        (changed("quantized", quantization_config={"load_in_8bit": True}), "is quantized"),
        (changed("other", model_type="bert"), "is a bert"),
        (changed("wider", projection_dim=20), "cannot be read|incomplete"),
        (changed("deeper", text_config={**TEXT, "num_hidden_layers": 2}), "incomplete"),
    ):
        with pytest.raises(UserError, match=told):
            judge_named(f"clip:{folder}")


def test_a_module_of_the_folder_is_never_imported(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = tmp_path / "remote"
    folder.mkdir()
    for file in folders["clip"].iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    witness = tmp_path / "was_run"
    (folder / "own.py").write_text(f"open({str(witness)!r}, 'w')\nclass Own: pass\n")
    automatic = dict.fromkeys(("AutoConfig", "AutoModel", "AutoImageProcessor", "AutoTokenizer"), "own.Own")
    for name in ("config.json", "preprocessor_config.json", "tokenizer_config.json"):
        content = json.loads((folder / name).read_text()) | {"auto_map": automatic}
        (folder / name).write_text(json.dumps(content))
    judge_named(f"clip:{folder}")
    assert not witness.exists()
