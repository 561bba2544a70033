"""What says how much a unit of width matters: one measure a file."""
