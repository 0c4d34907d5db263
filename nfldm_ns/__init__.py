from nfldm_ns.light_imports import import_lightly
from nfldm_ns.moved_modules import find_moved_modules

find_moved_modules()
import_lightly()
