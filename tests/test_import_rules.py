"""What may run without what. Who may import whom is in pyproject.toml, and checked by lint-imports (`make check`)."""

from __future__ import annotations

import importlib.util
import pkgutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def modules_of(package: str) -> list[str]:
    """Every module of a package, found without importing it."""
    spec = importlib.util.find_spec(package)
    assert spec is not None
    inner = pkgutil.walk_packages(spec.submodule_search_locations, f"{package}.")
    return [package, *(module.name for module in inner)]


@pytest.mark.parametrize(
    ("package", "allowed"), [("ranker.ops", ["ranker.ops"]), ("ranker.longseq", ["ranker.ops", "ranker.longseq"])]
)
def test_runs_where_only_pytorch_is_installed(package: str, allowed: list[str]):
    """Every module imports although TorchRec, FBGEMM, pyarrow and the rest of this project are out of reach."""
    script = f"""
        import importlib, sys

        def blocked(name):
            ours = name.split(".")[0] in ("features", "ranker", "launch") and name != "ranker"
            return name.split(".")[0] in ("torchrec", "fbgemm_gpu", "pyarrow", "triton") or (
                ours and not name.startswith({tuple(allowed)!r})
            )

        class Block:
            def find_spec(self, name, path=None, target=None):
                if blocked(name):
                    raise ModuleNotFoundError(f"{{name}} is blocked", name=name)

        sys.meta_path.insert(0, Block())
        for name in {modules_of(package)!r}:
            importlib.import_module(name)
        assert not [name for name in sys.modules if blocked(name)]
    """
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr


def test_the_command_line_needs_no_torch():
    """Help and `ranker doctor` must work when torch does not."""
    script = "import sys; sys.modules['torch'] = None; sys.modules['pyarrow'] = None; import ranker.cli, ranker.doctor"
    result = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
