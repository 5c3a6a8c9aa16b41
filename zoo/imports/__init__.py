"""Other people's model zoos: one reader per layout, each gives a ``Population``."""
