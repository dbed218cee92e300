"""Parallelism inside a layer: tensor parallel, sequence parallel, expert parallel."""
