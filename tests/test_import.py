"""What importing the package does not do."""

import subprocess
import sys

import pytest

# After Detectron2, which may need them, nothing that is not on every platform can be imported, and
# no process can be started.
SCRIPT = """
import subprocess, sys
import detectron2.modeling, detectron2.engine, detectron2.evaluation, detectron2.export

HIDDEN = ("fcntl", "grp", "posix", "pwd", "resource", "syslog", "termios", "msvcrt", "winreg")

class Hide:
    def find_spec(self, name, path=None, target=None):
        if name in HIDDEN or name.partition(".")[0] == "triton":
            raise ModuleNotFoundError(f"{name} is hidden", name=name)

for name in [*sys.modules]:
    if name in HIDDEN or name.partition(".")[0] == "triton":
        del sys.modules[name]
sys.meta_path.insert(0, Hide())

def refuse(*args, **kwargs):
    raise AssertionError("importing starts a process")

subprocess.Popen.__init__ = refuse
import wsbcn_d2, wsbcn_d2.engine
print(*sorted(name for name in sys.modules if name.startswith("wsbcn_d2.ops")))
"""


def test_nothing_of_one_platform_and_nothing_compiled():
    result = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]
    modules = result.stdout.split()
    assert "wsbcn_d2.ops.eager" in modules
    assert not {"wsbcn_d2.ops.triton_backend", "wsbcn_d2.ops.native_backend"} & set(modules)


@pytest.mark.parametrize("module", ["wsbcn_d2", "wsbcn_d2.ops", "wsbcn_d2.layers"])
def test_alone(module):
    """Whichever is imported first."""
    subprocess.run([sys.executable, "-c", f"import {module}"], check=True)
