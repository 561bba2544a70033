"""A model behind an OpenAI-compatible API; heavy imports happen in the modules, not here."""
