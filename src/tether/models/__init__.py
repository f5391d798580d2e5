"""Models: loading, the language model as trunk and head, policy with critic and reference, reward model, export."""
