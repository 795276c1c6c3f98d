"""Fused operators for unlearning in diffusion models."""
