"""The command line: one file a verb; each parses, calls the API and says how to draw it."""
