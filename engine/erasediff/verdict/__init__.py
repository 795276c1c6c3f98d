"""Verdict of an unlearning run: whether the model forgot what it was asked to, and kept the rest."""
