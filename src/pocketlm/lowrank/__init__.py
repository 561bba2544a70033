"""Low-rank methods, one file each: a config class and pure functions. They import core only."""
