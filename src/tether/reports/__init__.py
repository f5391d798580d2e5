"""One self-contained HTML file about a run: its figures, curves, answers before and after, alarms and config.

The file works offline: plotly's script is inside. Nothing in it is trusted: everything that a model or a user wrote is
escaped text, and a content security policy lets no script run but the two that are named by their hash.
"""

from tether.reports.page import report

__all__ = ["report"]
