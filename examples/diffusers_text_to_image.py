"""diffusers' own text-to-image training loop (examples/text_to_image), with unlearning in the place of its loss."""

import nano_pipeline
import torch
from accelerate import Accelerator
from diffusers.optimization import get_scheduler

from erasediff import EraseDiff

STEPS = 10


def main() -> None:
    accelerator = Accelerator()
    pipeline = nano_pipeline.pipeline()  # yours: StableDiffusionPipeline.from_pretrained(...)
    tokenizer, text_encoder, vae, unet = pipeline.tokenizer, pipeline.text_encoder, pipeline.vae, pipeline.unet
    for frozen in (vae, text_encoder):
        frozen.requires_grad_(False).to(accelerator.device)
    optimizer = torch.optim.AdamW(unet.parameters(), lr=1e-5, weight_decay=1e-2)
    lr_scheduler = get_scheduler("constant_with_warmup", optimizer, num_warmup_steps=2)
    retain_loader, forget_loader = (
        torch.utils.data.DataLoader(nano_pipeline.images_with_captions(what), batch_size=2, shuffle=True)
        for what in ("a cat", "van gogh")
    )
    unet, optimizer, retain_loader, forget_loader, lr_scheduler = accelerator.prepare(
        unet, optimizer, retain_loader, forget_loader, lr_scheduler
    )
    unlearner = EraseDiff(unet, optimizer, process=pipeline.scheduler)

    @torch.no_grad()
    def encoded(batch: dict) -> dict[str, torch.Tensor]:
        latents = vae.encode(batch["pixel_values"]).latent_dist.sample() * vae.config.scaling_factor
        tokens = tokenizer(batch["caption"], padding="max_length", truncation=True, return_tensors="pt").input_ids
        return {"sample": latents, "encoder_hidden_states": text_encoder(tokens.to(latents.device))[0]}

    for _, retain, forget in zip(range(STEPS), retain_loader, forget_loader, strict=False):
        report = unlearner.step(encoded(retain), encoded(forget))
        lr_scheduler.step()
    accelerator.print(f"retain {report.retain_loss:.5f} forget {report.forget_loss:.5f} {report.multiplier:.5f}")

    state = dict(unlearner.full_weights())
    if accelerator.is_main_process:
        pipeline.unet = accelerator.unwrap_model(unet)
        pipeline.unet.load_state_dict(state)
        pipeline.save_pretrained("unlearned")
    accelerator.end_training()


if __name__ == "__main__":
    main()
