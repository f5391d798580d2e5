"""Samplers: from prompts to completions. `build_sampler` gives the one that a config names."""
