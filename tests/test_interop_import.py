"""Without torch, `import evo_jax` works and `import evo_jax.interop` says what to install."""

import subprocess
import sys

from conftest import quick_environment

_SCRIPT = """
import sys
sys.modules["torch"] = None  # as where it is not installed
import evo_jax
assert not any(name.startswith("evo_jax.interop") for name in sys.modules)
try:
    import evo_jax.interop
except ImportError as error:
    print(error)
"""


def test_the_interop_alone_needs_torch_and_says_what_to_install():
    command = [sys.executable, "-c", _SCRIPT]
    done = subprocess.run(command, env=quick_environment(), capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "evo_jax.interop needs PyTorch: pip install 'evo-jax[torch]'\n"
