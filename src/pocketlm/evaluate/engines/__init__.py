"""Real engines, each in an environment of its own: asked by processes, answered in files."""
