"""Adapters to other codebases; each imports its codebase, and none is imported by the core."""
