"""Before a run: what this machine has, whether the data is right, and whether the run fits in memory."""

from tether.diagnose.checks import doctor, dry_run
from tether.diagnose.memory import Memory, Part, predict

__all__ = ["Memory", "Part", "doctor", "dry_run", "predict"]
