"""``python -m sclightning``."""

from sclightning.cli import main

if __name__ == "__main__":
    main()
