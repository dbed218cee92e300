"""Measuring finished models on this machine: loss on held-out text, size on disk, speed, with intervals."""
