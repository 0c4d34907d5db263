from nfldm_ns.moved_modules import find_moved_modules

find_moved_modules()
