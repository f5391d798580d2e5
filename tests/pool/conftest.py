"""These tests need Ray: `make test-ray` installs it and runs them; elsewhere they are skipped."""

import os
from collections.abc import Iterator

import pytest


@pytest.fixture(scope="session")
def ray() -> Iterator[object]:
    """A local Ray with room for four workers, joined already: a pool neither starts nor ends another."""
    if not os.environ.get("TETHER_TEST_RAY"):
        pytest.skip("Ray has a stage of its own: make test-ray")
    import ray

    os.environ.update(RAY_worker_niceness="0")
    ray.init(address="local", num_cpus=4, include_dashboard=False, log_to_driver=False)
    yield ray
    ray.shutdown()
