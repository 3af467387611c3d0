"""Kernels on plain PyTorch tensors. Imports nothing of ours, so that each can be timed and reused alone."""
