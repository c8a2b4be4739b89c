"""The Python of docs/soft_ar.md runs as it stands there."""

import re
from pathlib import Path

import pytest

PAGE = Path(__file__).parents[2] / "docs" / "soft_ar.md"


@pytest.mark.slow  # loads SmolLM2
def test_the_page_runs():
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    names = {}
    for block in blocks:
        exec(compile(block, str(PAGE), "exec"), names)
    assert names["nearest"].collapsed.any()
    assert names["by_head"].collapsed.any()
    assert names["state"].window.lengths.item() == names["ids"].shape[1] + 8
