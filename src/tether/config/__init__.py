"""What a run is made of: sections and their rules, and how YAML, flags and --help meet them. Loads no torch."""
