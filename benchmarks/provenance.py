"""What the result of a benchmark was made by."""

import subprocess
from pathlib import Path


def commit() -> str | None:
    """Commit of the repository that these scripts are in, whatever folder they are run from; None if there is none."""
    git = ["git", "-C", str(Path(__file__).parent), "rev-parse", "-q", "--verify", "HEAD"]
    return subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip() or None
