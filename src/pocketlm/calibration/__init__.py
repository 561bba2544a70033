"""Texts become token windows: builtin text, files, hub datasets; chat templates; seeds."""
