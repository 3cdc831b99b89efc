"""The examples of the runtime's guides run as they stand."""

import re
from pathlib import Path

import pytest
import tiny

DOCS = Path(__file__).parents[1] / "docs"


@pytest.mark.parametrize("name", ["runtime.md", "bundle.md"])
def test_the_examples_run(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    tiny.write(tmp_path / "model.sdgm")
    blocks = re.findall(r"```python\n(.*?)```", (DOCS / name).read_text("utf-8"), re.DOTALL)
    assert blocks
    exec(compile("\n".join(blocks), name, "exec"), {})
    assert capsys.readouterr().out
