"""How a duration is written, wherever one is shown."""


def format_duration(seconds: float) -> str:
    """The two largest units: 3 d 4 h, 5 h 6 min, 7 min 8 s, 9 s."""
    minutes, s = divmod(round(seconds), 60)
    hours, m = divmod(minutes, 60)
    days, h = divmod(hours, 24)
    return f"{days} d {h} h" if days else f"{h} h {m} min" if h else f"{m} min {s} s" if m else f"{s} s"
