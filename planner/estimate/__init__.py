"""The formulas: memory, compute, communication, step time, intervals. Pure functions over NumPy arrays."""
