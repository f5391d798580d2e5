"""A reward that comes from people: VADER's lexicon, 7,500 words that ten people each rated (Hutto & Gilbert 2014).

Needs `pip install vaderSentiment`.
"""

from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

_analyzer = SentimentIntensityAnalyzer()


def sentiment(completions: list[str], **_: object) -> list[float]:
    """How happy each story sounds, from -1 to 1."""
    return [_analyzer.polarity_scores(story)["compound"] for story in completions]
