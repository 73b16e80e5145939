"""Batches in, a segmentation model out: UniMatch with zero-shot labels. torch, never Ray."""
