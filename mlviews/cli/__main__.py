"""`python -m mlviews.cli` is the command `mlviews`."""

from mlviews.cli import main

if __name__ == "__main__":
    main()
