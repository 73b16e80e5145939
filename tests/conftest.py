"""For all tests: one thread for tensors this small, before anything imports torch.

More threads gain nothing here, and where other programs run they wait for each other.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
