"""Unlearning for diffusion models."""
