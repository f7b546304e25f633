"""One thread, here and in the processes that tests start: small models are fastest so, and results don't depend on cores."""

import os

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported
