"""The nouns of the project: frozen dataclasses, their units, and the files they are kept in."""
