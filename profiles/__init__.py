"""Data with a source and a date on every figure, and the small code that loads it.

Imports nothing of the other rooms: `profiles <- planner <- runner`.
"""
