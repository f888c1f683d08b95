"""Modules that carry information across segments or positions; each stands in a slot of a backbone. One paper a file."""
