"""Before a run: what this machine has, whether the data is right, and whether the run fits in memory. After: what went
wrong in it, and the knob to turn.

Every name below is loaded when it is first used: who looks at a run (`examine`, `tether.diagnose.alarms`) needs no
torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tether.diagnose.checks import doctor, dry_run
    from tether.diagnose.diagnosis import examine
    from tether.diagnose.memory import Memory, Part, predict

_HOME = {
    **dict.fromkeys(("doctor", "dry_run"), "tether.diagnose.checks"),
    "examine": "tether.diagnose.diagnosis",
    **dict.fromkeys(("Memory", "Part", "predict"), "tether.diagnose.memory"),
}

__all__ = ["Memory", "Part", "doctor", "dry_run", "examine", "predict"]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    raise AttributeError(f"module 'tether.diagnose' has no attribute {name!r}")
