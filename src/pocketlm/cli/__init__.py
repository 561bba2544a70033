"""The command line: one file per verb; each parses, calls the API and says how to draw the answer."""
