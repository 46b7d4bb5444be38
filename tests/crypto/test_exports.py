import subprocess
import sys
from types import ModuleType

import fedpt_secure.crypto as crypto


def test_every_public_name_exists_and_nothing_else_is_public():
    public = {name for name in vars(crypto) if not name.startswith("_") and name != "annotations"}
    modules = {name for name in public if isinstance(getattr(crypto, name), ModuleType)}
    assert sorted(public - modules) == sorted(crypto.__all__)


def test_the_package_imports_nothing_of_the_federation_and_no_tensor_library():
    program = (
        "import sys, fedpt_secure.crypto\n"
        "ours = [m for m in sys.modules if m.startswith('fedpt_secure.') and not m.startswith('fedpt_secure.crypto')]\n"
        "heavy = [m for m in ('torch', 'transformers', 'scipy', 'pydantic') if m in sys.modules]\n"
        "print([m for m in ours if m != 'fedpt_secure.errors'], heavy)\n"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[] []"
