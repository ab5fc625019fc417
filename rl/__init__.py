"""The core: types, tasks, samplers, the GRPO loop and evaluation. `distill` and `long2short` are built on it."""
