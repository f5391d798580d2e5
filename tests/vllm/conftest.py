"""These tests need vLLM: `make test-vllm` sets it up under .peers/vllm and runs them; elsewhere they are skipped."""

import os
from pathlib import Path

import pytest

PYTHON = Path(__file__).parents[2] / ".peers" / "vllm" / "bin" / "python"


@pytest.fixture(scope="session")
def python() -> str:
    """That of the environment that has vLLM."""
    if not os.environ.get("TETHER_TEST_VLLM"):
        pytest.skip("vLLM has a stage of its own: make test-vllm")
    assert PYTHON.exists(), "no vLLM: bench/peers/setup.sh vllm"
    return str(PYTHON)
