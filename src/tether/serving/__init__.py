"""A reward model over HTTP: what is asked, what is answered, and to whom."""
