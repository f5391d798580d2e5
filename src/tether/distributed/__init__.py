"""One run on many processes: who this process is and what they say to each other, and how weights are laid out."""
