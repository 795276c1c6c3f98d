"""Pretrained checkpoints: diffusers folders, single files, hub repositories; reading and writing them."""
