"""The diffusion process: schedules, parametrisations, timesteps, and where each random number comes from."""

from erasediff.process.noise import NoiseRole, draw_timesteps, noise_key
from erasediff.process.schedule import PREDICTION_TYPES, Process

__all__ = ["PREDICTION_TYPES", "NoiseRole", "Process", "draw_timesteps", "noise_key"]
