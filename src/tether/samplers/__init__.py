"""Samplers: from prompts to completions. `local.LocalSampler` is the engine of this process."""
