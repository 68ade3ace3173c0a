"""Offline export: the same pairs as files, for trainers that insist on them."""
