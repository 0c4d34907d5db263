import os

from nfldm_ns.light_imports import import_lightly
from nfldm_ns.moved_modules import find_moved_modules

# Before torch reads it: idle threads that spin make everything beside other work many times slower.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
find_moved_modules()
import_lightly()
