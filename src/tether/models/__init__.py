"""Models: loading, the language model's head, policy with critic and reference, reward model, export."""
