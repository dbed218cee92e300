"""planner's commands, one module each; `outlay.runner.cli` joins them."""
