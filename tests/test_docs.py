"""Every Python example of the documentation runs, in the order of its page."""

import re
from pathlib import Path

import pytest

DOCS = Path(__file__).parent.parent / "docs"


@pytest.mark.parametrize("page", ["python", "extending", "export"])
def test_examples_run(page, tmp_path, monkeypatch):
    """The examples of a page run from an empty folder, and the samples they make are finite images."""
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", (DOCS / f"{page}.md").read_text(), flags=re.DOTALL)
    assert blocks
    namespace = {}
    for block in blocks:
        exec(compile(block, f"{page}.md", "exec"), namespace)
    for name in {"samples", "two_step"} & namespace.keys():
        assert namespace[name].shape == (16, 3, 8, 8)
        assert namespace[name].isfinite().all()
        assert namespace[name].std() > 0.1
