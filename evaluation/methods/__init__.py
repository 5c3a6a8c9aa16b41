"""The table of all methods: settings, what is tried on them, rows that outlive a kill, tables."""
