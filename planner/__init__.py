"""Numbers only: what a run needs and costs, before anybody pays.

Imports numpy and `outlay.profiles`; never torch at module level, never deepspeed, never the runner.
"""
