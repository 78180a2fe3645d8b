"""For every test: Triton's kernels are interpreted, so that they run without a GPU.

Triton reads this setting once, when it is imported (bitsandbytes imports it, too), so it is made before anything else. It changes
nothing but what kernels of Triton do. `TRITON_INTERPRET=0` runs the tests of kernels on a GPU.
"""

import os

os.environ.setdefault("TRITON_INTERPRET", "1")
