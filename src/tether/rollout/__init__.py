"""Engines that sample responses."""

from tether.rollout.local import LocalSampler

__all__ = ["LocalSampler"]
