"""A file per command: its flags, its words, its exit code."""
