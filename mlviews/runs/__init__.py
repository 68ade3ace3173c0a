"""What long jobs share: processes, checkpoints, files, progress bars, and records of where a result comes
from.
"""
