"""The installed script, `fluxlab`: the same command as `python -m fluxlab.run`."""

import os
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(sys.executable).with_name("fluxlab")
PLUGIN = """
from fluxlab.positions import op
from fluxlab.select.arguments import number

@op("lean", {"by": number})
def lean(ids, scope, by=1.0):
    return ids
"""


def test_plugins_in_the_working_directory_are_found(tmp_path):
    (tmp_path / "my_ops.py").write_text(PLUGIN)
    variant = "+variants.mine={a: {op: lean, by: far}}"  # an error that only a known op can make, before any model
    words = ["+exp=hello", "plugins=[my_ops]", variant, "tracking=none"]
    env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = {}
    for name, start in {"script": [SCRIPT], "module": [sys.executable, "-m", "fluxlab.run"]}.items():
        done[name] = subprocess.run(
            [*start, *words], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=600
        )
    assert done["script"].returncode == 2, done["script"].stderr
    assert "variants.mine.a.by: 'far', expected a number" in done["script"].stderr
    assert done["script"].stderr == done["module"].stderr
