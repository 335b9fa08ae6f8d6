"""Emu3 for robots: one Transformer over text, image, video and action tokens."""
