"""Receipts of runs, their verification and signatures, and patches between checkpoints."""
